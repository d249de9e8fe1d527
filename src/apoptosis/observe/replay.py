"""Rows of sites that no hook on a module can observe: the model is run again on the user's inputs, after the step.

Holds: which passes are kept and run again, which rows of them are taken. Elsewhere: the second run itself
(passed in as a callable), sites that a hook can observe (window.py).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from apoptosis.distributed.ranks import Ranks
from apoptosis.distributed.sharded import has_shards
from apoptosis.errors import ApoptosisError, OutOfMemoryError, RankError
from apoptosis.numerics.devices import to_async
from apoptosis.observe.accumulators import (
    MIN_EXAMPLES,
    SAMPLE_ELEMENTS,
    SAMPLE_ROWS,
    WHOLE_COLUMNS,
    Accumulator,
    Observation,
    Sample,
    load_state_of,
    named_snapshot,
    needs_whole_inputs,
    state_of,
)
from apoptosis.observe.linear_map import sums_of
from apoptosis.records import Group, LinearSite, ProductSite, Seen, Site

MAX_PASSES = 16  # passes after which fewer than MIN_EXAMPLES examples are enough: each costs a forward pass
LAST_PASS = 64  # passes after which a site that still lacks rows is given up
_SLACK = 4  # rows are thinned out when there are this many times as many as needed

Replay = Callable[..., None]
"""graph.replay: (model, args, kwargs, watch, *, training) runs the model and calls watch(Seen) at every site."""


class _Share:
    """An even share of the rows of one pass, which arrive in an unknown number of pieces (steps of a recurrence)."""

    def __init__(self, wanted: int, columns: Tensor, generator: torch.Generator) -> None:
        self._wanted, self._columns, self._generator = wanted, columns, generator
        self._kept: list[Tensor] = []
        self._count, self._rate = 0, 1.0

    def add(self, x: Tensor) -> None:
        """Take from x (..., positions)."""
        rows = x.reshape(-1, x.shape[-1])
        if self._rate == 1.0 and rows.shape[0] > _SLACK * self._wanted:
            self._rate = 2.0 * self._wanted / rows.shape[0]
            self._kept = [self._thinned(kept, self._rate) for kept in self._kept]
        rows = rows if self._rate == 1.0 else self._thinned(rows, self._rate)
        self._kept.append(rows[:, self._columns.to(rows.device)])  # a copy
        self._count = sum(len(kept) for kept in self._kept)
        while self._count > _SLACK * self._wanted:
            self._rate /= 2.0
            self._kept = [self._thinned(torch.cat(self._kept), 0.5)]
            self._count = len(self._kept[0])

    def _thinned(self, rows: Tensor, rate: float) -> Tensor:
        chosen = torch.rand(rows.shape[0], generator=self._generator, dtype=torch.float32, device="cpu") < rate
        return rows[to_async(torch.from_numpy(np.flatnonzero(chosen.numpy())), rows.device)]

    def taken(self) -> Tensor | None:
        """Return at most as many rows as are needed, (rows, positions)."""
        if not self._kept:
            return None
        rows = torch.cat(self._kept)
        if len(rows) <= self._wanted:
            return rows
        return rows[
            to_async(torch.randperm(len(rows), generator=self._generator, device="cpu")[: self._wanted], rows.device)
        ]


class Replayed:
    """Observes functional sites by running the user's forward passes again.

    Args:
        model, replay: what is run, and how.
        generator: draws rows.
        exact: products in float64. every: run every pass again, though fewer are enough.
        spread: take only a share of the rows of every pass, as more passes follow; else all that are needed.
        ranks: of a sharded model, whose parameters are gathered at every pass: all ranks make equally many passes.
    """

    def __init__(
        self,
        model: nn.Module,
        replay: Replay | None,
        generator: torch.Generator,
        *,
        exact: bool,
        spread: bool,
        every: bool = False,
        ranks: Ranks | None = None,
    ) -> None:
        self._ranks, self._asked = ranks if has_shards(model) else None, True
        self._model, self._replay, self._generator, self._exact, self._spread = model, replay, generator, exact, spread
        self._watches: dict[tuple[str, str], Accumulator] = {}  # group "": all columns of a shared site
        self._places: list[tuple[str, Site, tuple[str, str]]] = []
        self._by_site: dict[str, list[tuple[str, str]]] = {}
        self._samples: dict[str, Sample] = {}
        self._convolves: dict[str, bool] = {}
        self._pending: list[tuple[tuple[Any, ...], dict[str, Any], int]] = []
        self._elements = 0
        self._passes, self._takes_every = 0, every
        self.examples = 0  # of all passes that could have been run again
        self._rates = {module.p for module in model.modules() if isinstance(module, nn.modules.dropout._DropoutNd)}

    def watch(self, group: Group, site: Site) -> None:
        """Observe a functional site of a group."""
        tensors: dict[str, Tensor] = dict(self._model.named_parameters(remove_duplicate=False))
        tensors |= dict(self._model.named_buffers(remove_duplicate=False))
        device = tensors[site.weight].device if site.weight in tensors else next(iter(tensors.values())).device
        key, columns, rows_for = (group.name, site.key), site.input_columns, group.num_channels
        if isinstance(site, ProductSite):
            columns, rows_for = site.input_columns.reshape(-1, 1), positions_per_sum(site, group.rows)
        elif isinstance(site, LinearSite) and needs_whole_inputs(site):
            self._samples.setdefault(site.key, Sample.of(site, exact=self._exact))
            self._convolves[site.key] = site.conv is not None
        elif len(columns) < site.num_columns <= WHOLE_COLUMNS:
            key, columns = ("", site.key), np.arange(site.num_columns, dtype=np.int64)[:, None]
        self._places.append((group.name, site, key))
        for own in (key, right_key(key)) if isinstance(site, ProductSite) else (key,):
            if own not in self._watches:
                self._watches[own] = Accumulator(
                    site, columns, rows_for, device, exact=self._exact, spread=self._spread
                )
                self._by_site.setdefault(site.key, []).append(own)
            self._watches[own].suffice_for(rows_for)

    def watches(self) -> list[Accumulator]:
        """Return all watches, in the order of their groups."""
        return list(self._watches.values())

    def watches_of(self, group: str) -> list[Accumulator]:
        """Return the watches of one group."""
        keys = [own for name, _, key in self._places if name == group for own in (key, right_key(key))]
        return [self._watches[key] for key in keys if key in self._watches]

    def samples(self) -> list[Sample]:
        """Return all samples."""
        return list(self._samples.values())

    # ------------------------------------------------------------------ passes

    @property
    def wants(self) -> bool:
        """Whether more passes are to be run again."""
        asked = bool(self._watches) and self._asked if self._ranks is not None else not self._enough()
        return self._replay is not None and (self._takes_more or (self._passes < LAST_PASS and asked))

    @property
    def _takes_more(self) -> bool:
        return self._takes_every and bool(self._watches)

    @property
    def finished(self) -> bool:
        """Whether nothing more will be observed."""
        return not self.wants

    @property
    def rows_needed(self) -> int:
        """Rows that the most demanding site needs."""
        return max((watch.rows_needed for watch in self._watches.values()), default=0)

    @property
    def saw_nothing(self) -> bool:
        """Whether nothing was observed at all."""
        return all(watch.rows == 0 and not watch.unusable for watch in self._watches.values())

    def lacking(self) -> dict[str, float]:
        """Return the groups whose sites lack rows, with the passes that they still need at the rate so far."""
        found: dict[str, float] = {}
        if not self.wants:
            return found
        most, least = LAST_PASS - self._passes, MIN_EXAMPLES if self._passes < MAX_PASSES else 0
        for group, site, key in self._places:
            sample = self._samples.get(site.key)
            for watch in (self._watches[own] for own in (key, right_key(key)) if own in self._watches):
                if not watch.enough(least):
                    examples = min(watch.missing_examples(self._passes), max(0, MAX_PASSES - self._passes))
                    passes = max(watch.missing_rows(self._passes), examples)
                    found[group] = max(found.get(group, 0.0), min(passes, most))
            if sample is not None and not sample.enough() and self._passes < MAX_PASSES:
                found[group] = max(found.get(group, 0.0), 1.0)
        return found

    def _enough(self) -> bool:
        least = MIN_EXAMPLES if self._passes < MAX_PASSES else 0
        return all(watch.enough(least) for watch in self._watches.values()) and all(
            sample.enough() or self._passes >= MAX_PASSES for sample in self._samples.values()
        )

    def keep(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], rows: int) -> None:
        """Keep the arguments of a pass until `run`; where a step has several passes, as many as are needed and fit.

        rows: examples in it, 0 if unknown.
        """
        self.examples += max(1, rows)
        if not self.wants or (self._passes + len(self._pending) >= LAST_PASS and not self._takes_more):
            return
        size = sum(x.numel() for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor))
        if self._pending and not self._takes_more and (self._elements + size > SAMPLE_ELEMENTS or self._will_do()):
            return
        self._elements += size
        own_args, own_kwargs = tree_map_only(Tensor, lambda x: x.detach().clone(), (args, dict(kwargs)))
        self._pending.append((own_args, own_kwargs, max(1, rows)))

    def _will_do(self) -> bool:
        """Whether the passes kept so far have enough examples."""
        coming = sum(rows for _, _, rows in self._pending)
        return all(watch.enough(MIN_EXAMPLES - coming) for watch in self._watches.values())

    def run(self) -> None:
        """Run the kept passes again. Warns once if the model cannot be run again; its sites are then not observed.

        Raises: OutOfMemoryError: memory ran out in one of them. RankError.
        """
        pending, self._pending, self._elements = self._pending, [], 0
        if self._ranks is not None and self.wants:
            own = torch.tensor([len(pending)], dtype=torch.int64, device="cpu")
            pending = pending[: int(self._ranks.range_of(own)[0])]
        for args, kwargs, rows in pending:
            if not self.wants or self._replay is None:
                return
            shares = self._open_shares(rows)
            seen: set[str] = set()

            def watch(one: Seen, shares: dict[tuple[str, str], _Share] = shares, seen: set[str] = seen) -> None:
                self._see(one, shares, first=one.site not in seen)
                seen.add(one.site)

            fault = self._fault_of(args, kwargs, watch)
            if fault := self._ranks.first_error(fault) if self._ranks is not None else fault:
                self._replay = None
                warnings.warn(
                    "apoptosis cannot run the model again on its inputs, so groups that only a second run can observe "
                    f"are not pruned: {fault}",
                    RuntimeWarning,
                    stacklevel=4,
                )
                return
            self._passes += 1
            for key, share in shares.items():
                self._book(self._watches[key], share, rows)
            if self._ranks is not None:
                self._asked = self._ranks.any(not self._enough())

    def _fault_of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], watch: Callable[[Seen], None]) -> str:
        """Run one pass again; return why that fails, "" if it does not.

        Raises: OutOfMemoryError: memory ran out. RankError: another rank failed.
        """

        def run() -> str:
            try:
                if self._replay is not None:
                    self._replay(self._model, args, kwargs, watch, training=self._model.training)
            except (OutOfMemoryError, RankError):
                raise
            except ApoptosisError as error:
                return str(error)
            return ""

        return run() if self._ranks is None else self._ranks.run_collectively(run)

    def _open_shares(self, rows: int) -> dict[tuple[str, str], _Share]:
        shares = {}
        for key, watch in self._watches.items():
            if not self._takes_every and watch.enough(MIN_EXAMPLES if self._passes < MAX_PASSES else 0):
                continue
            wanted = watch.share(-(-watch.rows_needed * rows // min(MIN_EXAMPLES, MAX_PASSES * rows)) + 1)
            columns = watch.columns
            shares[key] = _Share(max(1, -(-wanted // columns.shape[1])), columns.reshape(-1), self._generator)
        return shares

    def _see(self, seen: Seen, shares: Mapping[tuple[str, str], _Share], *, first: bool) -> None:
        for key in self._by_site.get(seen.site, ()):
            x = seen.right if key[1].endswith(_RIGHT) else seen.x
            if key not in shares or x is None or x.numel() == 0:
                continue
            watch = self._watches[key]
            if x.shape[-1] <= watch.last_column:
                watch.unusable = f"what '{watch.site.key}' reads changed its width while it was observed"
                continue
            shares[key].add(x.detach())
        sample = self._samples.get(seen.site)
        if first and sample is not None and not sample.enough():
            x = seen.x.detach().movedim(-1, 1) if self._convolves[seen.site] else seen.x.detach()
            if (
                x.is_complex() and not self._convolves[seen.site]
            ):  # an even share of all frequencies, not the first ones
                x = x.reshape(-1, x.shape[-1])
                x = x[:: max(1, len(x) // SAMPLE_ROWS)]
            sample.take(x.reshape(-1, x.shape[-1]) if x.dim() < 2 else x)

    def _book(self, watch: Accumulator, share: _Share, examples: int) -> None:
        rows = share.taken()
        if rows is None or watch.unusable:
            return
        channels, taps = watch.columns.shape
        watch.add(rows.reshape(-1, channels, taps).transpose(1, 2).reshape(-1, channels), examples)

    # ------------------------------------------------------------------ what was observed

    def observations(self, *, last: bool = False) -> dict[tuple[str, str], Observation]:
        """Return the observations by (group name, site key); sites without any are left out.

        last: return the moments themselves, not copies.

        Raises: NonFiniteError: rows hold NaN or infinity.
        """
        watches = ((key, watch) for key, watch in self._watches.items() if watch.rows or watch.unusable)
        moments = {key: named_snapshot(watch, last=last) for key, watch in watches}
        found = {}
        for group, site, key in self._places:
            if key not in moments or (isinstance(site, ProductSite) and right_key(key) not in moments):
                continue
            whole, own = None, moments[key]
            if not key[0]:
                whole = own
                own = whole.select(torch.as_tensor(site.input_columns[:, 0], device=whole.device))
            sample = self._samples.get(site.key)
            found[group, site.key] = Observation(
                moments=own,
                right=moments.get(right_key(key)),
                whole=whole,
                sample=None if sample is None else sample.joined(),
                dropout=self._dropout(site),
            )
        return found

    def _dropout(self, site: Site) -> float:
        """Return the rate of a dropout that is active in a second run: one that is no module, in training mode."""
        return site.dropout if self._model.training and site.dropout not in self._rates else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return everything exactly."""
        return {
            **state_of(self._watches, self._samples),
            "passes": self._passes,
            "examples": self.examples,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` wrote. Raises: KeyError: it is of other groups."""
        device = next((p.device for p in self._model.parameters()), torch.device("cpu"))
        load_state_of(self._watches, self._samples, state, device)
        self._passes, self.examples = int(state["passes"]), int(state["examples"])


_RIGHT = ":right"


def right_key(key: tuple[str, str]) -> tuple[str, str]:
    """Return the key of the right operand's accumulator."""
    return key[0], key[1] + _RIGHT


def positions_per_sum(site: ProductSite, rows: int) -> int:
    """Return the most positions that one sum of a product runs over."""
    counts = np.unique(sums_of(site, rows).reshape(-1), return_counts=True)[1]
    return int(counts.max())
