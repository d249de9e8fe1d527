"""Rows and whole inputs of one consumer site, as they come by.

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

ROWS_PER_CHANNEL = 3  # fewer rows understate the rank of the covariance and remove too much
POSITIONAL_ROWS_PER_CHANNEL = 8  # positions of one image are correlated: ask for more of them
LEAST_SHARE = 3  # a third of these rows serves, once a window has lasted STALE_STEPS
MIN_ROWS = 256  # of few channels, too: a ReLU that is hardly ever on must have been on
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
    """Whether products in float32 cannot tell errors of this size (relative rms) from round-off."""
    return tolerance < FLOAT32_RESOLVES


def needs_whole_inputs(site: Site) -> bool:
    """Whether errors at the site have to be measured on whole inputs: moments of its channels do not tell them."""
    return isinstance(site, LinearSite) and (site.is_complex or site.reads_positions)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Observation:
    """What a window saw at one (group, site).

    moments: of the group's channels; of a product those of the left operand at every one of its positions, channel by
        channel (channels * P). right: of the right operand likewise, for products alone.
    sample: (examples, ...) whole inputs of the module, where one row is not enough; else None.
    whole: moments of every input column of the module, where others than the group's are read too and one position at
        a time; else None.
    dropout: rate of a dropout that the rows were taken behind, 0.0 for none. grad_factor: (rows, channels) float32,
    rows that stand for the loss's gradients at the channels, in any unit; None where no backward pass came by.
    """

    moments: Moments
    right: Moments | None = None
    sample: Tensor | None = None
    whole: Moments | None = None
    dropout: float = 0.0
    grad_factor: Tensor | None = None


def in_both(one: Observation | None, other: Observation | None) -> Observation:
    """Return what two windows saw of the same examples in two modes as one; rows count once.

    Raises: ValueError: neither saw anything.
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
    """Join moments, with the count of the first: the same examples again say less than as many others would."""
    out = a.select(torch.arange(a.num_channels, device=a.device))
    out.merge(b)
    return out.counted(a.num_rows, a.num_examples)


class Accumulator:
    """Rows of some channels at one site: buffered raw, then folded into moments.

    Args:
        site: where they are read. columns: (channels, P), positions of each channel along the input's channel axis.
        rows_for: number of channels that the rows must suffice for. device: of the moments.
        exact: products in float64. spread: take of every batch only its share of the positions that are needed, as
            more batches will come; else as many as are needed of each.
    """

    def __init__(
        self, site: Site, columns: IntArray, rows_for: int, device: torch.device, *, exact: bool, spread: bool = True
    ) -> None:
        self.site = site
        self.exact, self.spread = exact, spread
        self.positional = site.reads_positions or site.channels_first
        self.rows_needed = Accumulator.needed(site, rows_for)
        self.moments = Moments(len(columns), device=device)
        self.buffer: list[Tensor] = []
        self.buffered = 0
        self.examples = 0
        self.last_pass = -1
        self.dropout: float | None = None  # that the rows lie behind; known with the first ones
        self.spoiled = ""  # why the rows cannot be used
        self._device = device
        self._flush_rows = _flush_rows(len(columns), exact=exact)
        blocks = site.input_columns.size // max(1, site.columns.size)  # of a grouped convolution
        self._width = site.num_columns * blocks
        self.columns, self.last_column = torch.as_tensor(columns, device=device), int(columns.max())
        self._all = columns.shape == (self._width, 1) and bool((columns[:, 0] == np.arange(self._width)).all())

    @staticmethod
    def needed(site: Site, num_channels: int) -> int:
        """Rows that suffice for a number of channels at a site."""
        positional = site.reads_positions or site.channels_first
        return max(MIN_ROWS, (POSITIONAL_ROWS_PER_CHANNEL if positional else ROWS_PER_CHANNEL) * num_channels)

    @property
    def rows(self) -> int:
        """Rows taken so far."""
        return self.moments.num_rows + self.buffered

    def enough(self, examples: int = MIN_EXAMPLES) -> bool:
        """Whether nothing more need be seen; examples: the least to see."""
        return bool(self.spoiled) or (self.rows >= self.rows_needed and self.examples >= examples)

    def serves(self) -> bool:
        """Whether what was seen tells something: widths up to a share of the rows."""
        return bool(self.spoiled) or (self.rows * LEAST_SHARE >= self.rows_needed and self.examples >= MIN_EXAMPLES)

    def said(self) -> str:
        """Say in words what has been seen of what is needed."""
        rows = f"{self.rows:,} of the {self.rows_needed:,} rows" if self.rows < self.rows_needed else ""
        examples = f"{self.examples:,} of the {MIN_EXAMPLES} examples" if self.examples < MIN_EXAMPLES else ""
        return f"'{self.site.module}' had seen {' and '.join(filter(None, (rows, examples)))} that it needs"

    def missing_rows(self, steps: int, share: int = 1) -> float:
        """Return the steps until rows / share are seen of those needed, if as many come as in the steps so far."""
        missing = max(0, -(-self.rows_needed // share) - self.rows)
        return missing * steps / self.rows if self.rows else (float("inf") if missing else 0.0)

    def missing_examples(self, steps: int) -> float:
        """Return the steps until MIN_EXAMPLES are seen, if as many come as in the steps so far."""
        missing = max(0, MIN_EXAMPLES - self.examples)
        return missing * steps / self.examples if self.examples else (float("inf") if missing else 0.0)

    def take(self, x: Tensor, picks: torch.Generator, *, examples: int, repeated: bool, dropout: float) -> None:
        """Take rows (positions, channels) from one module input; of many positions an even share of every batch.

        Args:
            x: the input.
            picks: draws the positions.
            examples: the most that the pass can have.
            repeated: the module has run in this pass before, so these are the same examples again.
            dropout: rate of the dropout that x lies behind; rows of another rate than the first ones are passed over.
        """
        if self.dropout is None:
            self.dropout = dropout
        if self.dropout != dropout:
            return
        rows = self.flat(x)
        examples = max(1, min(examples, x.shape[0] if x.dim() > 1 else 1))
        if not self.fits(rows):
            self.spoiled = f"the input of '{self.site.module}' changed its width while it was watched"
            return
        share = self.share(-(-self.rows_needed * examples // MIN_EXAMPLES) + 1)
        taken = self.picked(rows, share if self.positional or rows.shape[0] > examples else None, picks)
        self.add(taken, 0 if repeated else examples)

    def flat(self, x: Tensor) -> Tensor:
        """Return an input of the module as rows (positions, channels of the input)."""
        z = x.movedim(1, -1) if self.site.channels_first and x.dim() > 2 else x
        return z.reshape(-1, z.shape[-1]).to(self._device)

    def fits(self, rows: Tensor) -> bool:
        """Whether rows are as wide as the input that was captured."""
        return rows.shape[1] == self._width

    def picked(self, rows: Tensor, share: int | None, picks: torch.Generator) -> Tensor:
        """Return rows of the watch's channels, (rows * P, channels), or `share` of them drawn with replacement.

        What is returned may be the rows themselves.
        """
        taps = self.columns.shape[1]
        total = rows.shape[0] * taps
        if share is not None and total > share:
            chosen = to_async(torch.randint(0, total, (share,), generator=picks, device="cpu"), rows.device)
            taken = rows.index_select(0, chosen // taps)
            return taken if self._all else taken.gather(1, self.columns.T[chosen % taps])
        if self._all:
            return rows
        spread = rows[:, self.columns.reshape(-1)].reshape(rows.shape[0], *self.columns.shape)
        return spread.transpose(1, 2).reshape(-1, len(self.columns))

    def share(self, even: int) -> int:
        """Return the rows to take of one input; even: its share of what is needed, if more inputs come.

        Where only what is exact may go, all rows within EXACT_MACS: a channel that is silent but for a few positions of
        a thousand is not silent.
        """
        wanted = even if self.spread else self.rows_needed
        return max(wanted, EXACT_MACS // self.moments.num_channels**2) if self.exact else wanted

    def add(self, rows: Tensor, examples: int) -> None:
        """Take rows (rows, channels); examples: how many new ones they come from.

        What waits to be multiplied is copied; a batch of rows that suffices for a product is not.
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
        except NonFiniteError as error:  # the user's forward pass is running: it must not fail because of this
            self.spoiled = str(error)
        self.buffer, self.buffered = [], 0

    def _add_buffer(self, moments: Moments) -> None:
        if self.buffer:
            rows = self.buffer[0] if len(self.buffer) == 1 else torch.cat(self.buffer)
            moments.update(rows, exact=self.exact, checked=not is_async(rows.device))

    def apply_checkpoint(self, moments: Moments, examples: int) -> None:
        """Take moments of more rows, these among them, in the place of its own."""
        self.moments, self.examples, self.buffer, self.buffered = moments, examples, [], 0

    def snapshot(self, *, last: bool = False) -> Moments:
        """Moments of all rows so far.

        last: the watch hands its own over, without a copy, and takes no more rows. Else what is buffered stays
        buffered, so that looking changes nothing.

        Raises: NonFiniteError: rows hold NaN or infinity.
        """
        if self.spoiled:
            raise NonFiniteError(self.spoiled)
        found = self.moments if last else self.moments.copy()
        self._add_buffer(found)
        if last:
            self.moments, self.buffer, self.buffered = Moments(found.num_channels, device=self._device), [], 0
        found.check()
        return found

    def state_dict(self) -> dict[str, Any]:
        """Everything exactly: buffered rows stay rows, so that a resumed run sums in the same order."""
        moments, spoiled = self.moments, self.spoiled
        try:
            moments.check()
        except NonFiniteError as error:
            moments, spoiled = Moments(moments.num_channels), spoiled or str(error)
        return {
            "examples": self.examples,
            "dropout": self.dropout,
            "spoiled": spoiled,
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
        self.spoiled = str(state["spoiled"])


def _flush_rows(channels: int, *, exact: bool) -> int:
    """Return how many rows are multiplied at once.

    In float64 there is a triangular factorisation with each product, whose cost does not fall with the rows.
    """
    return _FLUSH_ROWS if exact else min(_FLUSH_ROWS, max(_LEAST_FLUSH, _FLUSH_NUMBERS // channels))


def named_snapshot(watch: Accumulator, *, last: bool = False) -> Moments:
    """Take a watch's moments; what is wrong with its rows is told of the module that read them."""
    try:
        return watch.snapshot(last=last)
    except NonFiniteError as error:
        raise NonFiniteError(f"at the input of '{watch.site.module}': {error}") from error


class Sample:
    """The first whole inputs of one module, as many as are needed to measure what its outputs do."""

    def __init__(self, *, exact: bool, most: int = SAMPLE_EXAMPLES) -> None:
        self.kept: list[Tensor] = []
        self._dtype = torch.float64 if exact else torch.float32
        self._most = most

    @classmethod
    def of(cls, site: Site, *, exact: bool) -> Sample:
        """Make one for a site: of single positions more examples are needed than of whole maps."""
        return cls(exact=exact, most=SAMPLE_EXAMPLES if site.reads_positions else SAMPLE_ROWS)

    def _missing(self) -> int:
        size = self.kept[0][0].numel() if self.kept else 1
        wanted = max(1, min(self._most, SAMPLE_ELEMENTS // max(size, 1)))
        return max(0, wanted - sum(len(x) for x in self.kept))

    def enough(self) -> bool:
        """Whether nothing more need be seen."""
        return self._missing() == 0

    def take(self, x: Tensor) -> None:
        """Keep examples of one input; of inputs of varying size those shaped like the first."""
        if self.kept and x.shape[1:] != self.kept[0].shape[1:]:
            return
        size = max(1, x[0].numel())
        free = self._missing() if self.kept else max(1, min(self._most, SAMPLE_ELEMENTS // size))
        device = self.kept[0].device if self.kept else x.device
        dtype = self._dtype.to_complex() if x.is_complex() else self._dtype
        self.kept.append(x[:free].to(device, dtype, copy=True))

    def joined(self) -> Tensor | None:
        """All that was kept, (examples, ...); None before anything was."""
        if not self.kept:
            return None
        return self.kept[0] if len(self.kept) == 1 else torch.cat(self.kept)


def state_of(watches: Mapping[tuple[str, str], Accumulator], samples: Mapping[str, Sample]) -> dict[str, Any]:
    """Return what was seen by (group, site) and by name, exactly."""
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
