"""Parameters that are spread over processes (fully_shard)."""

from apoptosis.distributed.fsdp.checks import check_sharded, group_of
from apoptosis.distributed.fsdp.tensors import Whole, has_shards, is_sharded, part, swap_local, whole
from apoptosis.distributed.fsdp.units import is_unit, reset_fsdp_state, reshard, summon_full_params, unsharded_forward

__all__ = [
    "Whole",
    "check_sharded",
    "group_of",
    "has_shards",
    "is_sharded",
    "is_unit",
    "part",
    "reset_fsdp_state",
    "reshard",
    "summon_full_params",
    "swap_local",
    "unsharded_forward",
    "whole",
]
