"""transformers: a callback of its Trainer, and folders of `save_pretrained` that know their widths.

Holds: the names that users import. Elsewhere: the callback (callback.py), folders on disk (folders.py), those for plain
`from_pretrained` (plain.py).
"""

from apoptosis.integrations.transformers.callback import ApoptosisTrainerCallback
from apoptosis.integrations.transformers.folders import from_pretrained
from apoptosis.integrations.transformers.plain import save_plain

__all__ = ["ApoptosisTrainerCallback", "from_pretrained", "save_plain"]
