"""Hooks that exist only during a window and turn the user's own forward passes into moments at consumer sites.

Lives here: which forward passes count, which rows are taken from them, when a window has seen enough. Does not live
here: what is done with the moments (planner) or when a window opens (policy). Nothing here changes a tensor of the
user's, draws from a global generator or raises inside the user's forward pass.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from apoptosis.numerics.moments import Moments
from apoptosis.records import Group, Site

ROWS_PER_CHANNEL = 3  # fewer rows understate the rank of the covariance and remove too much
POSITIONAL_ROWS_PER_CHANNEL = 8  # positions of one image are correlated: ask for more of them
MIN_EXAMPLES = 256  # distinct examples every window sees, whatever the number of positions
SAMPLE_EXAMPLES = 64  # whole inputs kept for sites that read several positions at once
SAMPLE_ELEMENTS = 500_000  # and their bound in numbers, 2 MB in float32
_FLUSH_ROWS = 4096  # buffered rows are turned into a Gram matrix in one product


def reads_several_positions(site: Site) -> bool:
    """Whether one output of the site sees more than one position of a channel, so channel moments do not suffice."""
    return site.taps > 1 or site.columns.shape[1] > 1 or site.input_columns.shape[1] > 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Observation:
    """What a window saw at one (group, site): moments of the channels, and whole inputs where one row is not enough.

    sample: (examples, ...) inputs of the module as it got them, or None for sites that read one position.
    """

    moments: Moments
    sample: Tensor | None


class _Watch:
    """Rows of one group at one site: buffered raw, then folded into moments."""

    def __init__(self, group: Group, site: Site, device: torch.device, exact: bool) -> None:
        self.site = site
        self.exact = exact
        self.positional = reads_several_positions(site) or site.kind != "linear"
        per_channel = POSITIONAL_ROWS_PER_CHANNEL if self.positional else ROWS_PER_CHANNEL
        self.rows_needed = per_channel * group.num_channels
        self.moments = Moments(group.num_channels, device=device)
        self.buffer: list[Tensor] = []
        self.buffered = 0
        self.examples = 0
        columns = torch.as_tensor(site.input_columns, device=device)
        self.columns = columns
        self.whole = columns.shape[1] == 1 and bool(
            (columns[:, 0] == torch.arange(len(columns), device=device)).all().item()
        )

    @property
    def rows(self) -> int:
        return self.moments.num_rows + self.buffered

    def enough(self) -> bool:
        return self.rows >= self.rows_needed and self.examples >= MIN_EXAMPLES

    def take(self, x: Tensor, picks: torch.Generator) -> None:
        """Take rows (positions, channels) from one module input; at most what an even share of examples needs."""
        z = x.movedim(1, -1) if self.site.kind != "linear" and x.dim() > 2 else x
        examples = z.shape[0] if z.dim() > 1 else 1
        rows = z.reshape(-1, z.shape[-1])
        if self.positional or rows.shape[0] > examples:
            share = -(-self.rows_needed * examples // MIN_EXAMPLES) // self.columns.shape[1] + 1
            if rows.shape[0] > share:
                chosen = torch.randint(0, rows.shape[0], (share,), generator=picks)
                rows = rows.index_select(0, chosen.to(rows.device))
        if not self.whole or rows.shape[1] != len(self.columns):
            picked = rows[:, self.columns.reshape(-1)].reshape(rows.shape[0], *self.columns.shape)
            rows = picked.transpose(1, 2).reshape(-1, len(self.columns))
        else:
            rows = rows.clone()
        self.buffer.append(rows.float() if not self.exact else rows.double())
        self.buffered += rows.shape[0]
        self.examples += examples

    def flush(self) -> None:
        if self.buffer:
            rows = self.buffer[0] if len(self.buffer) == 1 else torch.cat(self.buffer)
            self.moments.update(rows, exact=self.exact)
            self.buffer, self.buffered = [], 0


class Observer:
    """One observation window over the consumer sites of some groups.

    Args:
        model: the user's model; hooks go onto its modules while the window is open.
        groups: the groups to watch (unpinned ones).
        seed: seed of the private generator that picks positions.
        exact: products in float64 (tolerance 0).
        keep_inputs: also keep the last arguments of the root module, for the probe of a run without held-out data.
        any_mode: take every forward pass (one-shot use on a trained network) instead of training passes alone.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        *,
        seed: int,
        exact: bool = False,
        keep_inputs: bool = False,
        any_mode: bool = False,
    ) -> None:
        self._model = model
        self._modules = dict(model.named_modules())
        self._generator = torch.Generator().manual_seed(seed)
        self._watches: dict[tuple[str, str], _Watch] = {}
        self._by_module: dict[str, list[_Watch]] = {}
        self._samples: dict[str, list[Tensor]] = {}
        self._calls: dict[str, int] = {}
        self._handles: list[RemovableHandle] = []
        self._keep_inputs, self._any_mode = keep_inputs, any_mode
        self.inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self.hook_seconds = 0.0
        for group in groups:
            for site in group.sites:
                parameter = model.get_parameter(site.weight)
                watch = _Watch(group, site, parameter.device, exact)
                self._watches[group.name, site.key] = watch
                self._by_module.setdefault(site.module, []).append(watch)
                if reads_several_positions(site):
                    self._samples.setdefault(site.module, [])

    @property
    def is_open(self) -> bool:
        """Whether hooks are on the user's modules now."""
        return bool(self._handles)

    def open(self) -> None:
        """Put the hooks on."""
        if self._handles:
            return
        for name in self._by_module:
            hook = self._make_hook(name)
            self._handles.append(self._modules[name].register_forward_pre_hook(hook, with_kwargs=True))
        if self._keep_inputs:
            self._handles.append(self._model.register_forward_pre_hook(self._root_hook, with_kwargs=True))

    def close(self) -> None:
        """Take every hook off; what was seen stays."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @property
    def examples(self) -> int:
        """Examples seen so far, at the site that saw most."""
        return max((watch.examples for watch in self._watches.values()), default=0)

    def end_step(self) -> bool:
        """An optimizer step has passed; returns whether every site has seen enough rows and examples."""
        self._calls.clear()
        done = True
        for name, watches in self._by_module.items():
            if not (all(w.enough() for w in watches) and self._sampled(name)):
                done = False
        return done

    def _sampled(self, module: str) -> bool:
        kept = self._samples.get(module)
        if kept is None:
            return True
        size = kept[0][0].numel() if kept else 1
        return sum(len(k) for k in kept) >= max(1, min(SAMPLE_EXAMPLES, SAMPLE_ELEMENTS // max(size, 1)))

    def _counts(self, name: str) -> bool:
        """Training passes with gradients count; a checkpointed segment's recomputation in backward does not again."""
        if self._any_mode:
            return True
        if not (self._model.training and torch.is_grad_enabled()):
            return False
        if torch._C._current_graph_task_id() != -1:  # inside backward: activation checkpointing recomputes
            return self._calls.get(name, 0) <= 0 and self._count_backward(name)
        self._calls[name] = self._calls.get(name, 0) + 1
        return True

    def _count_backward(self, name: str) -> bool:
        # Reentrant checkpointing runs the first pass without gradients, so its recomputation is the one that counts.
        self._calls[name] = self._calls.get(name, 0) - 1
        return True

    def _make_hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            start = time.perf_counter()
            if self._counts(name):
                x = args[0] if args else kwargs.get("input")
                if isinstance(x, Tensor) and x.numel():
                    self._take(name, x.detach())
            self.hook_seconds += time.perf_counter() - start

        return hook

    def _take(self, name: str, x: Tensor) -> None:
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            watches = self._by_module[name]
            if watches[0].site.kind != "linear" and x.dim() == watches_dim(self._modules[name]) - 1:
                x = x.unsqueeze(0)  # an unbatched convolution input
            if not all(w.enough() for w in watches):
                for watch in watches:
                    watch.take(x, self._generator)
                    if watch.buffered >= _FLUSH_ROWS:
                        watch.flush()
            if name in self._samples and not self._sampled(name):
                size = max(1, x[0].numel())
                room = max(1, min(SAMPLE_EXAMPLES, SAMPLE_ELEMENTS // size)) - sum(map(len, self._samples[name]))
                self._samples[name].append(x[:room].float().clone())

    def _root_hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        training = self._model.training and torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1
        if self._any_mode or training:
            self.inputs = (args, kwargs)

    def observations(self) -> dict[tuple[str, str], Observation]:
        """Moments and samples by (group name, site key). Raises NonFiniteError when rows hold NaN or infinity."""
        found = {}
        for (group, key), watch in self._watches.items():
            watch.flush()
            kept = self._samples.get(watch.site.module)
            sample = _join(kept) if kept and reads_several_positions(watch.site) else None
            found[group, key] = Observation(moments=watch.moments, sample=sample)
        return found

    def state_dict(self) -> dict[str, Any]:
        """The half-filled window, exactly: buffered rows stay rows, so that a resumed run sums in the same order."""
        watches = [
            {
                "group": group,
                "site": key,
                "examples": watch.examples,
                "moments": watch.moments.state_dict(),
                "buffer": list(watch.buffer),
            }
            for (group, key), watch in self._watches.items()
        ]
        return {
            "watches": watches,
            "samples": {name: list(kept) for name, kept in self._samples.items()},
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a window written by `state_dict` of an observer of the same groups."""
        for entry in state["watches"]:
            watch = self._watches[entry["group"], entry["site"]]
            device = watch.columns.device
            watch.moments.load_state_dict(entry["moments"])
            watch.buffer = [rows.to(device) for rows in entry["buffer"]]
            watch.buffered = sum(len(rows) for rows in watch.buffer)
            watch.examples = int(entry["examples"])
        for name, kept in state["samples"].items():
            self._samples[name] = list(kept)
        self._generator.set_state(state["generator"])


def watches_dim(module: nn.Module) -> int:
    """Dimensions of a batched input of a convolution: weight (out, in, *kernel) has as many."""
    weight = module.weight
    return weight.dim() if isinstance(weight, Tensor) else 0


def _join(kept: list[Tensor]) -> Tensor:
    shapes = {tuple(k.shape[1:]) for k in kept}
    if len(shapes) > 1:  # inputs of varying size: keep those shaped like the first
        kept = [k for k in kept if k.shape[1:] == kept[0].shape[1:]]
    return kept[0] if len(kept) == 1 else torch.cat(kept)
