"""Reductions in as little memory as they need, and what they cost the outputs of a linear map.

Holds: `CompactReduction`, `output_errors`. Elsewhere: computing mixes (criteria), folding them (surgery).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from apoptosis.errors import ShapeError
from apoptosis.numerics.decompose import complement, stands_for_itself
from apoptosis.numerics.moments import Moments
from apoptosis.records import SiteReduction

_OUTPUTS = 128  # whose weights are taken to float64 at once
_COLUMNS = 128  # of a residual that are written out at once


class CompactReduction(SiteReduction):
    """A SiteReduction that reproduces every kept channel, stored without the columns of the kept channels.

    It holds at most a quarter of channels² numbers, where a mix may hold all of them; `mix` is built each time that it
    is read.

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
    """Return a reduction to the channels `keep` in as little memory as it needs."""
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


def output_errors(weight_OC: Tensor, moments: Moments, keep_K: Tensor, found: SiteReduction) -> Tensor:
    """diag(W R Wᵀ), R = E[(z - ẑ)(z - ẑ)ᵀ] for ẑ = z_K @ mix + offset: (out,) float64, never below zero.

    Of few outputs the errors are energies of U z, U = W with the columns of what errs folded away from the kept ones;
    of many, R is written out a few hundred columns at a time.

    Args:
        weight_OC: (out, channels).
        moments: of the channels.
        keep_K: (kept,) int64, sorted.
        found: how the kept channels stand in for all.

    Raises: ShapeError: the numbers of channels differ.
    """
    mean, num = moments.mean, moments.num_channels
    keep, offset = keep_K.to(mean.device), None if found.offset is None else found.offset.to(mean)
    if weight_OC.ndim != 2 or weight_OC.shape[1] != num or mix_shape(found) != (keep.numel(), num):
        raise ShapeError(f"output_errors: weight of shape {tuple(weight_OC.shape)} for {num} channels.")
    erring, part = _erring(keep, found, offset, num)
    part = part.to(mean)
    outputs, err, kept = len(weight_OC), erring.numel(), keep.numel()
    bias = mean[erring] - mean[keep] @ part
    if offset is not None:
        bias -= offset[erring]
    errors = torch.zeros(outputs, dtype=torch.float64, device=mean.device)
    pieces = [slice(first, first + _OUTPUTS) for first in range(0, outputs, _OUTPUTS)]

    def weights(piece: slice) -> Tensor:
        return weight_OC[piece].detach().to(mean.device)[:, erring].double()

    for piece in pieces:
        errors[piece] = (weights(piece) @ bias).square_()
    if outputs * num**2 < 2 * (kept**2 * err + err**2 * kept + outputs * err**2):  # multiply-adds; it takes less memory
        for piece in pieces:
            folded = torch.zeros(len(errors[piece]), num, dtype=torch.float64, device=mean.device)
            folded[:, erring] = weights(piece)
            folded[:, keep] -= weights(piece) @ part.T
            errors[piece] += moments.energies(folded)
        return errors.clamp_min_(0.0)
    inner = _inner(moments, keep, erring, part)
    for start in range(0, err, _COLUMNS):
        columns = slice(start, start + _COLUMNS)
        residual = moments.covariances(erring, erring[columns]).addmm_(part.T, inner[:, columns])
        for piece in pieces:
            weight = weights(piece)
            errors[piece] += (weight @ residual).mul_(weight[:, columns]).sum(1)
    return errors.clamp_min_(0.0)


def _erring(keep_K: Tensor, found: SiteReduction, offset_C: Tensor | None, num: int) -> tuple[Tensor, Tensor]:
    """Return the channels that a reduction may change, and their columns of the mix.

    The removed channels, if every kept channel is reproduced exactly.
    """
    if offset_C is None or not bool(offset_C[keep_K].any()):
        if isinstance(found, CompactReduction):
            return complement(keep_K, num), found.part
        if stands_for_itself(found.mix, keep_K.to(found.mix.device)):
            gone = complement(keep_K, num)
            return gone, found.mix[:, gone.to(found.mix.device)]
    return torch.arange(num, device=keep_K.device), found.mix


def _inner(moments: Moments, keep_K: Tensor, erring_R: Tensor, part_KR: Tensor) -> Tensor:
    """Return Σ_KK M - 2 Σ_KR, (kept, erring)."""
    inner = torch.empty_like(part_KR)
    for start in range(0, len(keep_K), _COLUMNS):
        rows, out = keep_K[start : start + _COLUMNS], inner[start : start + _COLUMNS]
        torch.mm(moments.covariances(rows, keep_K), part_KR, out=out)
        out.sub_(moments.covariances(rows, erring_R), alpha=2.0)
    return inner
