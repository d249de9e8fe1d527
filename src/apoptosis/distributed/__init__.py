"""Several processes that train one network; `rebuild_ddp` for training loops of your own."""

from apoptosis.distributed.ddp import rebuild_ddp

__all__ = ["rebuild_ddp"]
