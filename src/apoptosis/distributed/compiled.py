"""torch.compile: the module that it returns around another one.

Holds: looking inside. Elsewhere: running compiled code eagerly, and forgetting code for old shapes (model.passes).
"""

from __future__ import annotations

from typing import Any

from apoptosis.distributed.protocol import Wrapper, is_named, register_wrapper


class _Compiled(Wrapper):
    """A compiled module. Its guards see new shapes by themselves, so that there is nothing to set up."""

    name = "torch.compile"

    def matches(self, candidate: object) -> bool:
        return is_named(candidate, "OptimizedModule", "torch._dynamo")

    def unwrap(self, wrapped: Any) -> Any:
        return wrapped._modules.get("_orig_mod")


register_wrapper(_Compiled())
