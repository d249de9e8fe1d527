"""Rows and whole inputs of one consumer site, collected during a window.

Holds: which rows are taken from one input of a module, their moments, and when these are enough.
Elsewhere: hooks and which passes count (window.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apoptosis.errors import NonFiniteError
from apoptosis.numerics.devices import is_async, to_async
from apoptosis.numerics.moments import Moments
from apoptosis.records import IntArray, LinearSite, Site

ROWS_PER_CHANNEL = 3  # fewer rows understate the rank of the covariance, and too much would be removed
POSITIONAL_ROWS_PER_CHANNEL = 8  # positions of one image are correlated: ask for more of them
LEAST_SHARE = 3  # a third of these rows is enough, once a window has lasted STALE_STEPS
MIN_ROWS = 256  # for few channels, too: a ReLU that is hardly ever active must have been active
MIN_EXAMPLES = 256  # distinct examples every window sees, whatever the number of positions
WHOLE_COLUMNS = 4096  # a Gram matrix of all columns of a shared site is kept up to this many, 128 MB
SAMPLE_EXAMPLES = 64  # whole inputs kept for sites that read several positions at once
SAMPLE_ROWS = 1024  # the same for sites that read one position, where they have to be measured
SAMPLE_ELEMENTS = 500_000  # and their bound in numbers, 2 MB in float32
EXACT_MACS = 50_000_000_000  # what the Gram matrix of one input may cost where every position is to be seen
FLOAT32_RESOLVES = 1e-3  # relative rms: products in float32 know variances to 4 eps, the rms to the root of that
_FLUSH_ROWS = 4096  # buffered rows are turned into a Gram matrix in one product
_FLUSH_NUMBERS = 1 << 18  # of rows in float32 fewer: 1 MB, but for _LEAST_FLUSH rows of many channels
_LEAST_FLUSH = 256


def needs_float64(tolerance: float) -> bool:
    """Whether errors of this size (relative rms) are below the resolution of products in float32."""
    return tolerance < FLOAT32_RESOLVES


def is_positional(site: Site) -> bool:
    """Whether the rows of a site are positions of few examples, which are correlated."""
    return site.reads_positions or site.channels_first


def rows_per_channel(site: Site) -> int:
    """Return how many rows a window collects for every channel of a site."""
    return POSITIONAL_ROWS_PER_CHANNEL if is_positional(site) else ROWS_PER_CHANNEL


def needs_whole_inputs(site: Site) -> bool:
    """Whether errors at the site have to be measured on whole inputs, as moments of its channels do not suffice."""
    return isinstance(site, LinearSite) and (site.is_complex or site.reads_positions)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Observation:
    """What a window observed at one (group, site).

    moments: of the group's channels; of a product those of the left operand at every one of its positions, channel by
        channel (channels * P). right: of the right operand likewise, for products alone.
    sample: (examples, ...) whole inputs of the module, where one row is not enough; else None.
    whole: moments of every input column of the module, where others than the group's are read too and one position at
        a time; else None.
    dropout: rate of a dropout that the rows were taken behind, 0.0 for none. grad_factor: (rows, channels) float32,
    rows V with VᵀV = the second moment of the loss's gradients at the channels, in any unit; None without a backward
    pass.
    """

    moments: Moments
    right: Moments | None = None
    sample: Tensor | None = None
    whole: Moments | None = None
    dropout: float = 0.0
    grad_factor: Tensor | None = None


def in_both(one: Observation | None, other: Observation | None) -> Observation:
    """Return the observations of two windows, of the same examples in two modes, as one; rows count once.

    Raises: ValueError: both are None.
    """
    if one is None or other is None:
        if (alone := one or other) is None:
            raise ValueError("in_both: two observations that are both None")
        return alone

    def pooled(a: Moments | None, b: Moments | None) -> Moments | None:
        return a if a is None or b is None else _pooled(a, b)

    sample, more = one.sample, other.sample
    if sample is not None and more is not None and sample.shape[1:] == more.shape[1:]:
        sample = torch.cat([sample, more.to(sample)])
    return replace(
        one,
        moments=_pooled(one.moments, other.moments),
        right=pooled(one.right, other.right),
        whole=pooled(one.whole, other.whole),
        sample=sample,
    )


def _pooled(a: Moments, b: Moments) -> Moments:
    """Join moments, with the count of the first: the same examples again are no further ones."""
    out = a.select(torch.arange(a.num_channels, device=a.device))
    out.merge(b)
    return out.counted(a.num_rows, a.num_examples)


class Accumulator:
    """Collects rows of some channels at one site: buffered first, then added to the moments.

    Args:
        site: that reads the rows. columns: (channels, P), positions of each channel along the input's channel axis.
        rows_for: number of channels that the rows must suffice for. device: of the moments.
        exact: products in float64. spread: take only a share of the rows that are needed of every batch, as more
            batches follow; else all that are needed of each. width: places along that axis, where it is not the axis
            that the site's weight reads.
    """

    def __init__(
        self,
        site: Site,
        columns: IntArray,
        rows_for: int,
        device: torch.device,
        *,
        exact: bool,
        spread: bool = True,
        width: int | None = None,
    ) -> None:
        self.site = site
        self.exact, self.spread = exact, spread
        self.positional = is_positional(site)
        self.rows_needed = 0
        self.suffice_for(rows_for)
        self.moments = Moments(len(columns), device=device)
        self.buffer: list[Tensor] = []
        self.buffered = 0
        self.examples = 0
        self.last_pass = -1
        self.dropout: float | None = None  # that the rows lie behind; known with the first ones
        self.unusable = ""  # why the rows cannot be used
        self._device = device
        self._flush_rows = _flush_rows(len(columns), exact=exact)
        blocks = site.input_columns.size // max(1, site.columns.size)  # of a grouped convolution
        self._width = site.num_columns * blocks if width is None else width
        self.columns, self.last_column = torch.as_tensor(columns, device=device), int(columns.max())
        self._all = columns.shape == (self._width, 1) and bool((columns[:, 0] == np.arange(self._width)).all())

    def suffice_for(self, num_channels: int) -> None:
        """Ask for at least as many rows as this number of channels needs."""
        self.rows_needed = max(self.rows_needed, MIN_ROWS, rows_per_channel(self.site) * num_channels)

    @property
    def rows(self) -> int:
        """Rows taken so far."""
        return self.moments.num_rows + self.buffered

    def enough(self, examples: int = MIN_EXAMPLES) -> bool:
        """Whether enough was observed; examples: the smallest number of them."""
        return bool(self.unusable) or (self.rows >= self.rows_needed and self.examples >= examples)

    def serves(self) -> bool:
        """Whether what was observed is enough for widths up to a share of the rows."""
        return bool(self.unusable) or (self.rows * LEAST_SHARE >= self.rows_needed and self.examples >= MIN_EXAMPLES)

    def progress(self) -> str:
        """Return in words how much was observed of what is needed."""
        rows = f"{self.rows:,} of the {self.rows_needed:,} rows" if self.rows < self.rows_needed else ""
        examples = f"{self.examples:,} of the {MIN_EXAMPLES} examples" if self.examples < MIN_EXAMPLES else ""
        return f"'{self.site.module}' had seen {' and '.join(filter(None, (rows, examples)))} that it needs"

    def missing_rows(self, steps: int, share: int = 1) -> float:
        """Return the steps until a part, 1 / share, of the rows needed is there, at the rate of the steps so far."""
        missing = max(0, -(-self.rows_needed // share) - self.rows)
        return missing * steps / self.rows if self.rows else (float("inf") if missing else 0.0)

    def missing_examples(self, steps: int) -> float:
        """Return the steps until MIN_EXAMPLES are there, at the rate of the steps so far."""
        missing = max(0, MIN_EXAMPLES - self.examples)
        return missing * steps / self.examples if self.examples else (float("inf") if missing else 0.0)

    def take(self, x: Tensor, generator: torch.Generator, *, examples: int, repeated: bool, dropout: float) -> None:
        """Take rows (positions, channels) from one module input; where there are many, a share of every batch.

        Args:
            x: the input.
            generator: draws the positions.
            examples: the largest number that the pass can have.
            repeated: the module has run in this pass before, on the same examples.
            dropout: rate of the dropout in front of x; rows behind another rate than the first ones are ignored.
        """
        if self.dropout is None:
            self.dropout = dropout
        if self.dropout != dropout:
            return
        rows = self.flat(x)
        examples = max(1, min(examples, x.shape[0] if x.dim() > 1 else 1))
        if not self.fits(rows):
            self.unusable = f"the input of '{self.site.module}' changed its width while it was observed"
            return
        share = self.share(-(-self.rows_needed * examples // MIN_EXAMPLES) + 1)
        taken = self.picked(rows, share if self.positional or rows.shape[0] > examples else None, generator)
        self.add(taken, 0 if repeated else examples)

    def flat(self, x: Tensor) -> Tensor:
        """Return an input of the module as rows (positions, channels of the input)."""
        z = x.movedim(1, -1) if self.site.channels_first and x.dim() > 2 else x
        return z.reshape(-1, z.shape[-1]).to(self._device)

    def fits(self, rows: Tensor) -> bool:
        """Whether rows are as wide as the input that was captured."""
        return rows.shape[1] == self._width

    def picked(self, rows: Tensor, share: int | None, generator: torch.Generator) -> Tensor:
        """Return the rows of these channels, (rows * P, channels), or `share` of them drawn with replacement.

        The result may be `rows` itself.
        """
        taps = self.columns.shape[1]
        total = rows.shape[0] * taps
        if share is not None and total > share:
            chosen = to_async(torch.randint(0, total, (share,), generator=generator, device="cpu"), rows.device)
            taken = rows.index_select(0, chosen // taps)
            return taken if self._all else taken.gather(1, self.columns.T[chosen % taps])
        if self._all:
            return rows
        spread = rows[:, self.columns.reshape(-1)].reshape(rows.shape[0], *self.columns.shape)
        return spread.transpose(1, 2).reshape(-1, len(self.columns))

    def share(self, even: int) -> int:
        """Return how many rows to take of one input; even: its share of what is needed, if more inputs follow.

        In exact mode all rows within EXACT_MACS: a channel that is zero but for a few of a thousand positions must not
        count as zero.
        """
        wanted = even if self.spread else self.rows_needed
        return max(wanted, EXACT_MACS // self.moments.num_channels**2) if self.exact else wanted

    def add(self, rows: Tensor, examples: int) -> None:
        """Take rows (rows, channels); examples: how many new ones they come from.

        Rows that are buffered are copied; a batch that is large enough for a product of its own is not.
        """
        self.examples += examples
        if rows.is_complex():  # a real mix fits real and imaginary parts alike: they are rows of their own
            rows = torch.view_as_real(rows.resolve_conj()).movedim(-1, 0).flatten(0, 1)
        for start in range(0, rows.shape[0], self._flush_rows):
            piece = rows[start : start + self._flush_rows]
            at_once = not self.buffered and piece.shape[0] >= min(_LEAST_FLUSH, self._flush_rows) and not self.exact
            self.buffer.append(piece.to(self._device, piece.dtype if self.exact else torch.float32, copy=not at_once))
            self.buffered += piece.shape[0]
            if at_once or self.buffered >= self._flush_rows:
                self._flush()

    def _flush(self) -> None:
        try:
            self._add_buffer(self.moments)
        except NonFiniteError as error:  # the user's forward pass is running and must not fail
            self.unusable = str(error)
        self.buffer, self.buffered = [], 0

    def _add_buffer(self, moments: Moments) -> None:
        if self.buffer:
            rows = self.buffer[0] if len(self.buffer) == 1 else torch.cat(self.buffer)
            moments.update(rows, exact=self.exact, checked=not is_async(rows.device))

    def apply_checkpoint(self, moments: Moments, examples: int) -> None:
        """Take over moments that include these rows and more."""
        self.moments, self.examples, self.buffer, self.buffered = moments, examples, [], 0

    def snapshot(self, *, last: bool = False) -> Moments:
        """Moments of all rows so far.

        last: return the moments themselves, not a copy; no more rows are taken. Else rows that are buffered stay so,
        and nothing changes.

        Raises: NonFiniteError: rows hold NaN or infinity.
        """
        if self.unusable:
            raise NonFiniteError(self.unusable)
        found = self.moments if last else self.moments.copy()
        self._add_buffer(found)
        if last:
            self.moments, self.buffer, self.buffered = Moments(found.num_channels, device=self._device), [], 0
        found.check()
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return the exact state: buffered rows stay rows, so that a resumed run sums in the same order."""
        moments, unusable = self.moments, self.unusable
        try:
            moments.check()
        except NonFiniteError as error:
            moments, unusable = Moments(moments.num_channels), unusable or str(error)
        return {
            "examples": self.examples,
            "dropout": self.dropout,
            "spoiled": unusable,
            "moments": moments.state_dict(),
            "buffer": list(self.buffer),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` wrote."""
        self.moments.load_state_dict(state["moments"])
        self.buffer = [rows.to(self._device) for rows in state["buffer"]]
        self.buffered = sum(len(rows) for rows in self.buffer)
        self.examples = int(state["examples"])
        self.dropout = None if state["dropout"] is None else float(state["dropout"])
        self.unusable = str(state["spoiled"])


def _flush_rows(channels: int, *, exact: bool) -> int:
    """Return how many rows are multiplied at once.

    In float64 each product comes with a triangular factorisation, whose cost does not fall with the rows.
    """
    return _FLUSH_ROWS if exact else min(_FLUSH_ROWS, max(_LEAST_FLUSH, _FLUSH_NUMBERS // channels))


def named_snapshot(watch: Accumulator, *, last: bool = False) -> Moments:
    """Return the moments of an accumulator; an error names the module that read its rows."""
    try:
        return watch.snapshot(last=last)
    except NonFiniteError as error:
        raise NonFiniteError(f"at the input of '{watch.site.module}': {error}") from error


class Sample:
    """The first whole inputs of one module, as many as are needed to measure errors of its outputs.

    Where sizes vary from batch to batch, as those of padded sentences do, inputs of all sizes count, because the first
    size may never come again; errors are measured on those of the size that came most.
    """

    def __init__(self, *, exact: bool, most: int = SAMPLE_EXAMPLES) -> None:
        self.kept: list[Tensor] = []
        self._dtype = torch.float64 if exact else torch.float32
        self._most = most

    @classmethod
    def of(cls, site: Site, *, exact: bool) -> Sample:
        """Make one for a site; more examples where each is a single position, not a map."""
        return cls(exact=exact, most=SAMPLE_EXAMPLES if site.reads_positions else SAMPLE_ROWS)

    def _missing(self, size: int = 0) -> int:
        """Return how many examples of a size (numbers in each) are still wanted; of the largest so far by default."""
        size = max(1, size, *(x[0].numel() for x in self.kept))
        wanted = max(1, min(self._most, SAMPLE_ELEMENTS // size))
        room = max(0, SAMPLE_ELEMENTS - sum(x.numel() for x in self.kept)) // size if self.kept else wanted
        return max(0, min(wanted - sum(len(x) for x in self.kept), room))

    def enough(self) -> bool:
        """Whether enough was observed."""
        return bool(self.kept) and self._missing() == 0

    def take(self, x: Tensor) -> None:
        """Keep examples of one input."""
        free = self._missing(x[0].numel())
        if not free:
            return
        device = self.kept[0].device if self.kept else x.device
        dtype = self._dtype.to_complex() if x.is_complex() else self._dtype
        self.kept.append(x[:free].to(device, dtype, copy=True))

    def joined(self) -> Tensor | None:
        """Return what was kept of the size that came most, (examples, ...); None if nothing was."""
        by_size: dict[torch.Size, list[Tensor]] = {}
        for x in self.kept:
            by_size.setdefault(x.shape[1:], []).append(x)
        if not by_size:
            return None
        most = max(by_size.values(), key=lambda found: sum(len(x) for x in found))
        return most[0] if len(most) == 1 else torch.cat(most)


def state_of(watches: Mapping[tuple[str, str], Accumulator], samples: Mapping[str, Sample]) -> dict[str, Any]:
    """Return the exact state of accumulators by (group, site) and of samples by name."""
    return {
        "watches": [{"group": g, "site": k, **watch.state_dict()} for (g, k), watch in watches.items()],
        "samples": {name: list(sample.kept) for name, sample in samples.items()},
    }


def load_state_of(
    watches: Mapping[tuple[str, str], Accumulator],
    samples: Mapping[str, Sample],
    state: Mapping[str, Any],
    device: torch.device,
) -> None:
    """Take over what `state_of` wrote. Raises: KeyError: it is of other groups; nothing has changed then."""
    entries = {(entry["group"], entry["site"]): entry for entry in state["watches"]}
    if set(entries) != set(watches) or set(state["samples"]) != set(samples):
        raise KeyError("the window is of other groups")
    for key, entry in entries.items():
        watches[key].load_state_dict(entry)
    for name, kept in state["samples"].items():
        samples[name].kept = [x.to(device) for x in kept]
