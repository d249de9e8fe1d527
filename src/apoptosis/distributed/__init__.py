"""Several processes that train one network, and wrappers around models and optimizers.

The file of each kind registers it when it is imported.
"""

from apoptosis.distributed import compiled, fsdp, refused, zero  # noqa: F401
from apoptosis.distributed.ddp import rebuild_ddp
from apoptosis.distributed.protocol import Wrapper, register_wrapper
from apoptosis.distributed.wrappers import unwrapped

__all__ = ["Wrapper", "rebuild_ddp", "register_wrapper", "unwrapped"]
