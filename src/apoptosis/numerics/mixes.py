"""Reductions that store no more than what stands in for the removed channels.

Holds: CompactReduction, and how a plain one becomes such. Elsewhere: who computes mixes (criteria), who
folds them (surgery).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from apoptosis.numerics.decompose import complement, stands_for_itself
from apoptosis.records import SiteReduction


class CompactReduction(SiteReduction):
    """A SiteReduction whose kept channels stand for themselves, stored without their columns of the mix.

    At most a quarter as large as all pairs of channels, where the mix may be as large as these; `mix` is put together
    anew each time that it is read.

    Args:
        keep: (kept,) int64, sorted.
        part: (kept, removed) float64, the columns of the removed channels, in their order.
        offset: as in SiteReduction.

    Example:
        >>> found = CompactReduction(keep=torch.tensor([0, 2]), part=torch.tensor([[0.5], [1.0]]), offset=None)
        >>> found.mix.tolist(), found.shape
        ([[1.0, 0.5, 0.0], [0.0, 1.0, 1.0]], (2, 3))
    """

    __slots__ = ("keep", "part")

    keep: Tensor
    part: Tensor

    def __init__(self, *, keep: Tensor, part: Tensor, offset: Tensor | None) -> None:
        self.__setstate__([keep, part, offset])

    def __getstate__(self) -> list[Any]:
        return [self.keep, self.part, self.offset]

    def __setstate__(self, state: list[Any]) -> None:
        for name, value in zip(("keep", "part", "offset"), state, strict=True):
            object.__setattr__(self, name, value)  # as frozen as what it is derived from

    @property
    def shape(self) -> tuple[int, int]:
        """Kept channels, all channels."""
        kept, removed = self.part.shape
        return kept, kept + removed

    @property
    def mix(self) -> Tensor:
        """Return the mix, (kept, channels); a new tensor."""
        keep, mix = self.keep.to(self.part.device), self.part.new_zeros(self.shape)
        mix[:, complement(keep, self.shape[1])] = self.part
        mix[torch.arange(len(keep), device=mix.device), keep] = 1.0
        return mix


def compact(found: SiteReduction, keep: Tensor) -> SiteReduction:
    """Return a reduction to the channels `keep` in as little memory as it can be told in."""
    if isinstance(found, CompactReduction):
        return found
    keep = keep.to(found.mix.device)
    if not stands_for_itself(found.mix, keep):
        return found
    part = found.mix[:, complement(keep, found.mix.shape[1])]
    return CompactReduction(keep=keep, part=part, offset=found.offset)


def mix_shape(found: SiteReduction) -> tuple[int, ...]:
    """Return the shape of a mix without putting it together."""
    return found.shape if isinstance(found, CompactReduction) else tuple(found.mix.shape)
