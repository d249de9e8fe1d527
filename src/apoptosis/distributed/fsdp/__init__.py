"""Parameters that are spread over processes (fully_shard)."""

from apoptosis.distributed.fsdp.checks import check_sharded, group_of
from apoptosis.distributed.fsdp.tensors import Whole, exchange, has_shards, is_sharded, part, whole
from apoptosis.distributed.fsdp.units import at_rest, gathered, is_unit, lent, renew

__all__ = [
    "Whole",
    "at_rest",
    "check_sharded",
    "exchange",
    "gathered",
    "group_of",
    "has_shards",
    "is_sharded",
    "is_unit",
    "lent",
    "part",
    "renew",
    "whole",
]
