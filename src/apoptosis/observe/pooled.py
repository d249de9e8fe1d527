"""Pools what the windows of all ranks observed, as if one rank had observed it all.

Holds: two sums over all ranks per window, of counts and means first, then of scatter around the common mean, a
few sites at a time; whole inputs are exchanged. Elsewhere: what is observed (window.py), ranks (ranks.py).

The scatter of all rows is Σ_r [S_r + n_r (m_r - m)(m_r - m)ᵀ], m the mean of all (Chan, Golub, LeVeque): nothing
cancels, and every rank gets the same bits. Sketches are summed: every rank draws signs of its own. Triangles of
float64 rows (tolerance 0) are exchanged and put below each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from apoptosis.distributed.ranks import SUM_NUMBERS, Ranks
from apoptosis.errors import NonFiniteError
from apoptosis.numerics.moments import Moments
from apoptosis.numerics.sketch import Sketch
from apoptosis.observe.accumulators import Accumulator, Sample, named_snapshot


def share_out(watches: Iterable[Accumulator], ranks: Ranks) -> None:
    """Let every rank collect its share of the rows only."""
    for watch in watches:
        watch.rows_needed = -(-watch.rows_needed // ranks.size)


def pool(watches: Sequence[Accumulator], sketches: Sequence[Sketch], samples: Sequence[Sample], ranks: Ranks) -> None:
    """Put into every rank's accumulators what all ranks observed; the accumulators correspond, in order.

    Raises: NonFiniteError: rows of some rank hold NaN or infinity. RankError: a rank is gone.
    """
    if ranks.size == 1:
        return
    found = ranks.run_collectively(lambda: [named_snapshot(watch) for watch in watches])
    rates = ranks.gathered([watch.dropout for watch in watches])
    for number, watch in enumerate(watches):
        known = {one[number] for one in rates if one[number] is not None}
        if len(known) > 1:
            raise NonFiniteError(f"ranks saw the input of '{watch.site.module}' behind different dropouts")
        watch.dropout = next(iter(known), None)
    _pool_moments(watches, found, ranks)
    for sketch in sketches:
        sketch.pool(ranks.total)
    for sample in samples:
        own = sample.joined()
        share = None
        if own is not None:  # as many examples in all as one rank keeps
            share = own[: len(own) // ranks.size + (ranks.rank < len(own) % ranks.size)].cpu()
        device = torch.device("cpu") if own is None else own.device
        kept = [x for x in ranks.gathered(share) if x is not None and len(x)]
        sample.kept = [x.to(device) for x in kept if x.shape[1:] == kept[0].shape[1:]]


def _pool_moments(watches: Sequence[Accumulator], found: Sequence[Moments], ranks: Ranks) -> None:
    if not watches:
        return
    device = found[0].device
    numbers = [float(n) for m, w in zip(found, watches, strict=True) for n in (m.num_rows, m.num_examples, w.examples)]
    counts = torch.tensor(numbers, dtype=torch.float64, device=device)
    sums = ranks.total(torch.cat([counts, *((m.mean * m.num_rows).to(device) for m in found)]))
    exact = ranks.all(all(m.exact for m in found))
    totals = sums[: len(counts)].view(-1, 3).tolist()
    parts = torch.split(sums[len(counts) :], [m.num_channels for m in found])
    means = [part.to(m.device) / max(rows, 1.0) for part, m, (rows, _, _) in zip(parts, found, totals, strict=True)]
    for own in _buckets([m.num_channels * (m.num_channels + 1) // 2 for m in found]):
        packed = [found[i].scatter_around(means[i])[_upper(found[i])].to(device) for i in own]
        scatters = torch.split(ranks.total(torch.cat(packed)), [len(p) for p in packed])
        for i, scatter in zip(own, scatters, strict=True):
            whole = torch.zeros(2 * (found[i].num_channels,), dtype=torch.float64, device=found[i].device)
            whole[_upper(found[i])] = scatter.to(whole.device)
            whole += whole.triu(1).T
            rows, examples, seen = totals[i]
            pooled = Moments.of(means[i], whole, int(rows), int(examples), exact=exact)
            if exact:
                pooled.set_root(_root(found[i], means[i], ranks))
            watches[i].apply_checkpoint(pooled, int(seen))


def _root(own: Moments, mean: Tensor, ranks: Ranks) -> Tensor | None:
    """Stack the triangles of all ranks, in the order of the ranks, for decisions at tolerance 0."""
    root = own.root_around(mean)
    parts = [part for part in ranks.gathered(None if root is None else root.cpu()) if part is not None]
    return torch.cat(parts).to(own.device) if len(parts) == ranks.size else None


def _buckets(sizes: Sequence[int]) -> list[list[int]]:
    """Return places of consecutive sizes that add up to SUM_NUMBERS at most; a larger one is alone."""
    buckets: list[list[int]] = []
    free = 0
    for place, size in enumerate(sizes):
        if not buckets or size > free:
            buckets.append([])
            free = SUM_NUMBERS
        buckets[-1].append(place)
        free -= size
    return buckets


def _upper(moments: Moments) -> tuple[Tensor, Tensor]:
    rows, columns = torch.triu_indices(moments.num_channels, moments.num_channels, device=moments.device)
    return rows, columns
