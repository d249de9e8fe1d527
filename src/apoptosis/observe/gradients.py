"""The gradients of the loss at the inputs of sites: taken in backward passes and kept as sketches.

Holds: hooks on tensors of the user's passes, and the rows of gradients they take. Elsewhere: which passes
count and when a window is over (window.py), how errors are weighted (planner).

A change r of what a site reads changes the loss by g · r to first order, g the loss's gradient there (theory, "What the
loss sees"). Scale does not matter, so gradients of scaled losses and of means over batches are used as they are.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from apoptosis.numerics.devices import is_async, sample_rows
from apoptosis.numerics.sketch import Sketch, row_sizes
from apoptosis.observe.accumulators import WHOLE_COLUMNS, Accumulator
from apoptosis.observe.hooks import is_wrapped
from apoptosis.records import IntArray, NormSite, Site

_SURELY = 8  # times the rows that are needed, where it is not known how many of them are zero
_SHARE = 2  # batches, at least, that the rows of a window come from


class GradientWatch(Accumulator):
    """Collects the gradients at one site that are not zero (the loss may read one position of many), as a sketch.

    Gradients that are not finite are ignored: a loss scaler overflows now and then.
    """

    def __init__(self, site: Site, columns: IntArray, rows_for: int, device: torch.device) -> None:
        super().__init__(site, columns, rows_for, device, exact=False)
        self.sketch = Sketch(len(columns), device=device)

    @property
    def rows(self) -> int:
        """Rows taken so far."""
        return self.sketch.num_rows

    def take_gradient(self, gradient: Tensor, generator: torch.Generator) -> None:
        """Take rows of one gradient; where there are many, a share of them."""
        rows = self.flat(gradient)
        if not self.fits(rows):
            return
        ahead = is_async(rows.device)
        sizes = row_sizes(rows, ahead=ahead)
        good, share = sizes.ne(0) & sizes.isfinite(), -(-self.rows_needed // _SHARE)
        if ahead:
            rows = sample_rows(rows, good, share, generator)
        elif not bool(good.all()):
            rows = rows[good]
        self.sketch.add(self.picked(rows, share, generator), generator, some_empty=ahead)

    def enough(self, examples: int = 0) -> bool:
        """Whether enough was observed; more rows are asked for where some of them may be zero."""
        return super().enough(examples) and (not is_async(self._device) or self.rows >= _SURELY * self.rows_needed)

    def root(self, *, last: bool = False) -> Tensor | None:
        """Return V (rows, channels) float32 with VᵀV = Σ g gᵀ, sketched; None where that is not finite.

        last: return V itself, not a copy; the sketch is empty afterwards.
        """
        found = self.sketch.rows(last=last)
        if last:
            self.sketch = Sketch(self.sketch.num_channels, device=found.device)
        return found if bool(row_sizes(found, ahead=is_async(found.device)).isfinite().all()) else None

    def state_dict(self) -> dict[str, Any]:
        """Return everything exactly."""
        return {"sketch": self.sketch.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` wrote."""
        self.sketch.load_state_dict(state["sketch"])


class Gradients:
    """Gradients at the sites of a window, by the keys of its accumulators.

    Args:
        seed: of the private generator that draws positions.
        wanted: if False, nothing is observed.
    """

    def __init__(self, seed: int, *, wanted: bool) -> None:
        self._wanted = wanted
        self._watches: dict[tuple[str, str], GradientWatch] = {}
        self._by_module: dict[str, list[GradientWatch]] = {}
        self._handles: list[RemovableHandle] = []
        self._generator = torch.Generator().manual_seed(seed)
        self._seconds = 0.0

    def watch(self, key: tuple[str, str], site: Site, columns: IntArray, channels: int, device: torch.device) -> None:
        """Observe gradients at a site; columns: (channels, P) along its input's channel axis."""
        if not self._wanted or isinstance(site, NormSite) or len(columns) > WHOLE_COLUMNS:
            return
        found = GradientWatch(site, columns, channels, device)
        self._watches[key] = found
        self._by_module.setdefault(site.module, []).append(found)

    def watches(self) -> list[GradientWatch]:
        """Return all accumulators, in the order of their groups."""
        return list(self._watches.values())

    def attach(self, module: str, x: Tensor, *, unbatched: bool) -> None:
        """Observe the gradient of one input of a module in backward; unbatched: the input lacks a batch axis."""
        watches = [watch for watch in self._by_module.get(module, ()) if not watch.enough(0)]
        if watches and x.requires_grad and not x.is_complex():
            take = partial(self._take, watches, unbatched)
            self._handles.append(x.register_hook(take))  # type: ignore[no-untyped-call]  # torch's own

    def _take(self, watches: list[GradientWatch], unbatched: bool, gradient: Tensor | None) -> None:
        """Take rows of one gradient, inside the user's backward pass, which must not fail because of this."""
        if gradient is None or gradient.layout is not torch.strided or is_wrapped(gradient):
            return  # a user-defined function returned none, or a functional transform is running
        start = time.perf_counter()
        with torch.no_grad(), torch.autocast(gradient.device.type, enabled=False):
            g = gradient.detach().unsqueeze(0) if unbatched else gradient.detach()
            for watch in watches:
                if not watch.enough(0):
                    watch.take_gradient(g, self._generator)
        self._seconds += time.perf_counter() - start

    def end_step(self) -> float:
        """Remove the hooks of the step's tensors; return the seconds that they took."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def need(self, key: tuple[str, str], rows: int) -> None:
        """Ask for at least so many rows."""
        if key in self._watches:
            self._watches[key].rows_needed = max(self._watches[key].rows_needed, rows)

    def missing(self, key: tuple[str, str], channels: int, steps: int) -> float:
        """Return the steps until `root` has enough rows, at the rate of the steps so far; 0 without any row.

        Reads a number from the device.
        """
        rows = self.counted(key)
        return max(0, channels - rows) * steps / rows if rows else 0.0

    def counted(self, key: tuple[str, str]) -> int:
        """Return the rows of gradients observed for a key. Reads a number from the device."""
        watch = self._watches.get(key)
        return 0 if watch is None else watch.sketch.counted()

    def roots(self, needed: Mapping[tuple[str, str], int], *, last: bool = False) -> dict[tuple[str, str], Tensor]:
        """Return V (rows, columns) with VᵀV = Σ g gᵀ, sketched, by key.

        Args:
            needed: by key, the smallest number of rows.
            last: return the tensors themselves, not copies.
        """
        found = {
            key: watch.root(last=last)
            for key, watch in self._watches.items()
            if key in needed and watch.sketch.counted() >= needed[key]
        }
        return {key: root for key, root in found.items() if root is not None}

    def state_dict(self) -> dict[str, Any]:
        """Return everything exactly."""
        return {
            "watches": [{"group": g, "site": k, **watch.state_dict()} for (g, k), watch in self._watches.items()],
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` wrote.

        Raises: KeyError: it is of other groups.
        """
        entries = {(entry["group"], entry["site"]): entry for entry in state["watches"]}
        if set(entries) != set(self._watches):
            raise KeyError("the window is of other groups")
        for key, entry in entries.items():
            self._watches[key].load_state_dict(entry)
        self._generator.set_state(state["generator"].cpu())
