"""Several processes that train one network, and wrappers around models and optimizers.

Every kind of wrapper is one file, which registers it when it is imported; all files of this folder are.
"""

from importlib import import_module
from pkgutil import iter_modules

from apoptosis.distributed.ddp import rebuild_ddp
from apoptosis.distributed.protocol import Wrapper, register_wrapper
from apoptosis.distributed.wrappers import unwrapped

__all__ = ["Wrapper", "rebuild_ddp", "register_wrapper", "unwrapped"]

for _file in iter_modules(__path__):
    import_module(f"{__name__}.{_file.name}")
