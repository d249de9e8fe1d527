"""Hooks that exist only during a window and collect moments at consumer sites from the user's forward passes.

Holds: which forward passes count, when a window is over. Elsewhere: which rows are taken (accumulators.py),
sites that no hook can observe (replay.py), what is done with the moments (planner), when a window opens (policy).
Nothing here changes a tensor of the user's, draws from a global generator or raises inside the user's
forward pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.hooks import RemovableHandle

from apoptosis.distributed.ranks import Ranks
from apoptosis.interrupts import uninterrupted
from apoptosis.model.passes import Eager
from apoptosis.observe.accumulators import (
    LEAST_SHARE,
    MIN_EXAMPLES,
    WHOLE_COLUMNS,
    Accumulator,
    Observation,
    Sample,
    load_state_of,
    named_snapshot,
    needs_whole_inputs,
    state_of,
)
from apoptosis.observe.dropouts import DROPOUTS, Dropped
from apoptosis.observe.gradients import Gradients
from apoptosis.observe.hooks import Hook, in_backward, is_plain, is_wrapped, take_off
from apoptosis.observe.operands import Operands
from apoptosis.observe.pooled import pool, share_out
from apoptosis.observe.replay import Replay, Replayed
from apoptosis.observe.unfinished import Unfinished
from apoptosis.records import Group, LinearSite, ProductSite, Site

BLIND_STEPS = 64  # steps without any row after which a window ends
STALE_STEPS = 48  # after so many steps the network has changed, above all at the start of a run
KEPT_ELEMENTS = 1 << 24  # of the calls that are kept, 64 MB in float32
_SPARE = 16  # further steps after which a site that is four times slower than the rest is not waited for


class Observer:
    """One observation window over the consumer sites of some groups.

    Args:
        model: the user's model; hooks go onto its modules while the window is open.
        groups: the groups to observe (open ones).
        seed: seed of the private generator that draws positions.
        exact: products in float64 (tolerances that float32 does not resolve). every: take rows of every pass, though
            fewer are enough (tolerance 0, where a channel that is zero in some batches only must be kept).
        keep_inputs: also keep the largest training batch, for the probe of a run without held-out data.
        keep_calls: also keep what training passes were called with, up to KEPT_ELEMENTS numbers, as `calls`.
        any_mode: take every forward pass (one-shot use on a trained network in evaluation mode) instead of training
            passes only.
        replay: graph.replay, which runs the model again to observe functional sites; without it they are left out.
        gradients: also observe the loss's gradients at the sites. ranks: that collect the rows together.
        whole: collect all rows that every width needs, however many steps it takes.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        *,
        seed: int,
        exact: bool = False,
        every: bool = False,
        keep_inputs: bool = False,
        keep_calls: bool = False,
        any_mode: bool = False,
        replay: Replay | None = None,
        gradients: bool = False,
        ranks: Ranks | None = None,
        whole: bool = True,
    ) -> None:
        self._model, self._whole, self._takes_every = model, whole, every
        self._modules = dict(model.named_modules())
        self._generator = torch.Generator().manual_seed(seed)
        self._watches: dict[
            tuple[str, str], Accumulator
        ] = {}  # group "": all columns of a site that several groups share
        self._places: list[tuple[str, Site, tuple[str, str]]] = []  # group, site, key of its watch
        self._by_module: dict[str, list[Accumulator]] = {}
        self._dims: dict[str, int] = {}  # of the weight that a module's first site reads
        self._gradients = Gradients(seed, wanted=gradients and not any_mode)
        self._samples: dict[str, Sample] = {}
        self._calls: dict[str, int] = {}
        self._dropped, self._unfinished = Dropped(), Unfinished()
        self._handles: list[RemovableHandle] = []
        self._mark = object()  # of this window's hooks
        self._keep_inputs, self._keep_calls, self._any_mode = keep_inputs, keep_calls, any_mode
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._call_elements = 0
        self._passes, self._inside, self._root_rows, self._largest = 0, False, 0, 0
        self.steps = 0  # that the window has lasted
        self.patience = 0  # steps before which it is not asked whether to go on for groups that lack rows
        self.cut_short = False  # whether it ended without waiting for them
        self.inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._input_rows, self._eager, self._suspended = 0, Eager(), False  # suspended: while the model is run again
        self._only: frozenset[str] | None = None  # modules that take rows now, None for all
        self.hook_seconds = 0.0  # and what running it again takes
        self._replayed = Replayed(
            model, replay, self._generator, exact=exact, spread=not any_mode, every=every, ranks=ranks
        )
        self._operands = Operands(model, exact=exact, spread=not any_mode)
        for group in groups:
            for site in group.sites:
                if isinstance(site, ProductSite) and site.outputs:
                    self._watches |= self._operands.watch(group, site)
                elif site.functional:
                    self._replayed.watch(group, site)
                else:
                    self._watch(group, site, exact)
        self._ranks, self._every = ranks or Ranks(), [*self._watches.values(), *self._replayed.watches()]
        share_out([*self._every, *self._gradients.watches()], self._ranks)

    def pool(self) -> None:
        """Pool what all ranks observed. Raises: NonFiniteError: rows of some rank hold NaN or infinity."""
        samples = [*self._samples.values(), *self._replayed.samples()]
        pool(self._every, [watch.sketch for watch in self._gradients.watches()], samples, self._ranks)

    def _watch(self, group: Group, site: Site, exact: bool) -> None:
        weight = self._model.get_parameter(site.weight)
        device = weight.device
        conv = site.conv if isinstance(site, LinearSite) else None
        self._dims.setdefault(site.module, weight.dim() if conv is None else len(conv.axes))
        alone = len(site.columns) * site.columns.shape[1] == site.num_columns
        several = needs_whole_inputs(site)
        whole = not alone and not several and site.num_columns <= WHOLE_COLUMNS
        key = ("" if whole else group.name, site.key)
        self._places.append((group.name, site, key))
        if key not in self._watches:
            columns = np.arange(site.num_columns, dtype=np.int64)[:, None] if whole else site.input_columns
            watch = Accumulator(site, columns, group.num_channels, device, exact=exact, spread=not self._any_mode)
            self._watches[key] = watch
            self._by_module.setdefault(site.module, []).append(watch)
            self._gradients.watch(key, site, columns, group.num_channels, device)
        self._watches[key].suffice_for(group.num_channels)
        self._gradients.need(key, self._watches[key].rows_needed)
        if several:
            self._samples.setdefault(site.module, Sample.of(site, exact=exact))

    @property
    def is_open(self) -> bool:
        """Whether hooks are on the user's modules now."""
        return bool(self._handles)

    def open(self) -> None:
        """Put the hooks on."""
        if self._handles:
            return
        try:
            self._put_on()
        except BaseException:
            self.close()
            raise

    def _put_on(self) -> None:
        self._eager.begin()  # compiled code does not see hooks that come later
        # The first of all hooks, to keep the arguments as the user gave them, before other hooks change them.
        enter = self._model.register_forward_pre_hook(Hook(self._enter, self._mark), with_kwargs=True, prepend=True)
        self._handles.append(enter)
        self._handles.append(self._model.register_forward_hook(Hook(self._leave, self._mark), always_call=True))
        for name in self._by_module:
            hook = Hook(self._make_hook(name), self._mark)
            self._handles.append(self._modules[name].register_forward_pre_hook(hook, with_kwargs=True))
        for name in self._operands.by_module:
            hook = Hook(self._make_output_hook(name), self._mark)
            self._handles.append(self._modules[name].register_forward_hook(hook))
        if any(watch.site.dropout > 0 for watch in self._watches.values()) and not self._any_mode:
            for name, module in self._modules.items():
                if type(module) in DROPOUTS:
                    hook = Hook(self._dropped.hook(name, self._trains), self._mark)
                    self._handles.append(module.register_forward_hook(hook))

    def pause(self) -> None:
        """Take the hooks off the modules until `open` is called; what is known of the step that runs is kept."""
        with uninterrupted():
            for handle in self._handles:
                handle.remove()
            for module in self._modules.values():
                take_off(module, self._mark)  # a hook whose handle was lost in an interrupt
            self._handles = []

    def close(self) -> None:
        """Remove every hook; what was observed is kept. After an interrupt it can be called again."""
        with uninterrupted():
            self.pause()
            self._dropped.clear()
            self._unfinished.release()
            self._gradients.end_step()
            self._eager.end()

    @property
    def unfinished(self) -> bool:
        """Whether the last training pass has not had its backward pass yet."""
        return self._unfinished.waits

    @property
    def examples(self) -> int:
        """Examples so far, at the site that has most."""
        return max((watch.examples for watch in self._watches.values()), default=self._replayed.examples)

    @property
    def saw_nothing(self) -> bool:
        """Whether nothing was observed at all."""
        return self._replayed.saw_nothing and all(w.rows == 0 and not w.unusable for w in self._watches.values())

    @property
    def unseen(self) -> frozenset[str]:
        """Modules that no pass has run yet."""
        named = (*self._by_module.items(), *self._operands.by_module.items())
        return frozenset(n for n, found in named if not any(w.rows or w.unusable for w in found))

    def lacks(self) -> str:
        """Return in words which site lacks most of the rows that it needs."""
        watch = min(self._every, key=lambda watch: watch.rows / watch.rows_needed, default=None)
        return "anything was seen" if watch is None else watch.progress()

    def seen_by(self, group: str) -> list[str]:
        """Return in words how much was observed of every site of a group that lacks rows."""
        places = (*self._places, *self._operands.places())
        own = [self._watches[key] for name, _, key in places if name == group]
        late = [watch.progress() for watch in (*own, *self._replayed.watches_of(group)) if not watch.enough()]
        return late or [f"too few gradients had come to '{watch.site.module}'" for watch in own]

    @contextmanager
    def only(self, modules: frozenset[str]) -> Iterator[None]:
        """Take rows at these modules only."""
        self._only = modules
        try:
            yield
        finally:
            self._only = None

    def end_step(self) -> bool:
        """Note an optimizer step, run its passes again where needed, and return whether the window is over.

        It is over when every site has enough rows and examples; from STALE_STEPS on, when all have enough for some
        widths; or after four times the steps that a site needs which runs once a step.
        """
        self._calls.clear()
        self._dropped.clear()
        self._unfinished.release()
        self.hook_seconds += self._gradients.end_step()
        self.steps += 1
        self._run_again()
        enough = self._replayed.finished and all(self._suffices(watch) for watch in self._watches.values())
        if enough and all(sample.enough() for sample in self._samples.values()):
            return True
        return self.steps >= self._last_step()

    def _suffices(self, watch: Accumulator) -> bool:
        return watch.serves() if self.steps >= STALE_STEPS and not self._whole else watch.enough()

    def _last_step(self) -> int:
        """Return the step of the window after which sites that lack rows are not waited for."""
        if not self._largest:
            return BLIND_STEPS
        rows = max(MIN_EXAMPLES, self._replayed.rows_needed, *(w.rows_needed for w in self._watches.values()))
        return _SPARE + 4 * -(-rows // self._largest)

    def lacking(self, *, gradients: bool = False) -> dict[str, float]:
        """Return the groups whose sites lack rows, with the steps that they still need at the rate so far.

        None once the window has to end. gradients: also those that lack gradients, without which errors would not be
        weighted; this waits for an accelerator.
        """
        most = self._last_step() - self.steps
        if most <= 0:
            return {}
        found = self._replayed.lacking()
        for group, site, key in (*self._places, *self._operands.places()):
            watch = self._watches[key]
            if not self._suffices(watch):
                steps = max(watch.missing_rows(self.steps), watch.missing_examples(self.steps))
                if not self._whole:
                    serves = max(watch.missing_rows(self.steps, LEAST_SHARE), watch.missing_examples(self.steps))
                    steps = min(steps, max(serves, STALE_STEPS - self.steps))
                found[group] = max(found.get(group, 0.0), min(steps, most))
            elif gradients and (steps := self._lacking_gradients(site, key)):
                found[group] = max(found.get(group, 0.0), min(steps, most))
            elif needs_whole_inputs(site) and not self._samples[site.module].enough():
                found[group] = max(found.get(group, 0.0), 1.0)
        return found

    def _lacking_gradients(self, site: Site, key: tuple[str, str]) -> float:
        return self._gradients.missing(key, -(-len(site.input_columns) // self._ranks.size), self.steps)

    def _run_again(self) -> None:
        start = time.perf_counter()
        self._suspended = True
        try:
            self._replayed.run()
        finally:
            self._suspended = False
            self.hook_seconds += time.perf_counter() - start

    # ------------------------------------------------------------------ hooks

    def _trains(self) -> bool:
        return self._model.training and torch.is_grad_enabled()

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._suspended or self._only is not None:
            return
        start = time.perf_counter()
        leaves = _leaves(args, kwargs)
        self._root_rows = int(leaves[0].shape[0]) if leaves else 0
        self._passes += 1
        self._inside = True
        if self._trains() and not self._any_mode and not in_backward():
            self._unfinished.begin()
        if self._any_mode or self._trains():
            self._largest = max(self._largest, self._root_rows)
            if self._replayed.wants and not in_backward() and not any(map(is_wrapped, leaves)):
                self._replayed.keep(args, kwargs, self._root_rows)
            if self._keep_calls and not in_backward() and not any(map(is_wrapped, leaves)):
                self._keep_call(args, kwargs, sum(x.numel() for x in leaves))
            if self._keep_inputs and self._root_rows >= self._input_rows and not in_backward():
                self._input_rows = self._root_rows
                self.inputs = tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, (args, dict(kwargs)))
        self.hook_seconds += time.perf_counter() - start

    def _keep_call(self, args: tuple[Any, ...], kwargs: dict[str, Any], elements: int) -> None:
        self._call_elements += elements
        if self._call_elements <= KEPT_ELEMENTS:
            self.calls.append(tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, (args, dict(kwargs))))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._inside = False
        if self._trains() and not (self._any_mode or self._suspended or self._only is not None or in_backward()):
            self._unfinished.end(x for x in tree_flatten(output)[0] if isinstance(x, Tensor))

    def _counts(self, name: str, of: str = "") -> bool:
        """Whether a call counts: in training passes with gradients; a checkpointed segment does not count again.

        of: what of the call is looked at, "" for its input.
        """
        if self._suspended or (self._only is not None and name not in self._only):
            return False
        if self._any_mode:
            return True
        if not self._trains():
            return False
        calls = self._calls.get(name + of, 0)
        if in_backward():
            # Reentrant checkpointing runs the first pass without gradients, so its recomputation is what counts.
            return calls == 0
        self._calls[name + of] = calls + 1
        return True

    def _make_hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            start = time.perf_counter()
            x = args[0] if args else kwargs.get("input")
            if isinstance(x, Tensor) and x.numel() and not is_wrapped(x) and self._counts(name):
                with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                    self._take(name, x.detach())
                if not self._any_mode:
                    self._unfinished.ask(x)
                self._gradients.attach(name, x, unbatched=self._lacks_batch(name, x))
            self.hook_seconds += time.perf_counter() - start

        return hook

    def _make_output_hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            start = time.perf_counter()
            if isinstance(output, Tensor) and output.numel() and not is_wrapped(output) and self._counts(name, ":out"):
                with torch.no_grad(), torch.autocast(output.device.type, enabled=False):
                    self._take_rows(self._operands.by_module[name], output.detach(), 0.0)
            self.hook_seconds += time.perf_counter() - start

        return hook

    def _lacks_batch(self, name: str, x: Tensor) -> bool:
        site = self._by_module[name][0].site
        return site.channels_first and x.dim() == self._dims[name] - 1

    def _take(self, name: str, x: Tensor) -> None:
        watches = self._by_module[name]
        sample = self._samples.get(name)
        full = not self._takes_every and all(watch.enough() for watch in watches)
        if full and (sample is None or sample.enough()):
            return
        site = watches[0].site
        before, rate = self._dropped.before(x) if site.dropout > 0 and not self._any_mode else (x, 0.0)
        if self._lacks_batch(name, before):
            before = before.unsqueeze(0)
        self._take_rows(watches, before, rate)
        if sample is not None and not sample.enough():
            sample.take(before)

    def _take_rows(self, watches: Sequence[Accumulator], x: Tensor, rate: float) -> None:
        """Let accumulators that want more take rows of what they read; rate: of the dropout that some are behind."""
        known = self._passes > 0 and (self._inside or in_backward())
        limit = self._root_rows if known and self._root_rows else x.shape[0]
        self._largest = max(self._largest, min(limit, x.shape[0] if x.dim() > 1 else 1))
        for watch in watches:
            if self._takes_every or not watch.enough():
                repeated = known and watch.last_pass == self._passes
                watch.last_pass = self._passes
                behind = rate * watch.site.dropout
                watch.take(x, self._generator, examples=limit, repeated=repeated, dropout=behind)

    # ------------------------------------------------------------------ what was observed

    def observations(self, *, last: bool = False) -> dict[tuple[str, str], Observation]:
        """Return the observations by (group name, site key); sites without any are left out.

        last: return the moments themselves, not copies; the window takes no more rows.

        Raises: NonFiniteError: rows hold NaN or infinity.
        """
        watches = ((key, watch) for key, watch in self._watches.items() if watch.rows or watch.unusable)
        moments = {key: named_snapshot(watch, last=last) for key, watch in watches}
        samples = {name: sample.joined() for name, sample in self._samples.items()}
        places = [place for place in self._places if place[2] in moments]
        needed: dict[tuple[str, str], int] = {}
        for _, site, key in places:
            needed[key] = min(needed.get(key, len(site.input_columns)), len(site.input_columns))
        rows = {key: self._gradients.counted(key) for key in needed}
        roots, found = self._gradients.roots(needed, last=last), {}
        for group, site, key in places:
            whole, own = None, moments[key]
            grad_factor = roots.get(key) if rows[key] >= len(site.input_columns) else None
            if not key[0]:
                whole = own
                own_columns = torch.as_tensor(site.input_columns[:, 0], device=whole.device)
                own, grad_factor = (
                    whole.select(own_columns),
                    None if grad_factor is None else grad_factor[:, own_columns],
                )
            sample = samples.get(site.module) if needs_whole_inputs(site) else None
            dropout = self._watches[key].dropout or 0.0
            found[group, site.key] = Observation(
                moments=own, sample=sample, whole=whole, dropout=dropout, grad_factor=grad_factor
            )
        return found | self._operands.observations(moments) | self._replayed.observations(last=last)

    def state_dict(self) -> dict[str, Any]:
        """Return the exact state of the unfinished window."""
        return {
            **state_of(self._watches, self._samples),
            "replayed": self._replayed.state_dict(),
            "gradients": self._gradients.state_dict(),
            "generator": self._generator.get_state(),
            "steps": self.steps,
            "patience": self.patience,
            "largest": self._largest,
            "inputs": self.inputs if self.inputs is not None and is_plain(self.inputs) else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a window written by `state_dict` of an observer of the same groups.

        Raises: KeyError, TypeError, ValueError, ApoptosisError: it is of other groups or damaged.
        """
        device = next((p.device for p in self._model.parameters()), torch.device("cpu"))
        replayed, keys = state["replayed"], {key for _, _, key in self._operands.places()}
        moved = [
            e for e in replayed["watches"] if (e["group"], e["site"]) in keys
        ]  # in files from before hooks saw them
        if moved:
            state = {**state, "watches": [*state["watches"], *moved]}
            replayed = {**replayed, "watches": [e for e in replayed["watches"] if not any(e is one for one in moved)]}
        load_state_of(self._watches, self._samples, state, device)
        self._replayed.load_state_dict(replayed)
        self._gradients.load_state_dict(state["gradients"])
        self._generator.set_state(state["generator"].cpu())
        self.steps, self._largest = int(state["steps"]), int(state["largest"])
        self.patience = int(state.get("patience", 0))
        if state["inputs"] is not None:
            args, kwargs = tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, state["inputs"])
            self.inputs = (tuple(args), dict(kwargs))
            self._input_rows = len(_leaves(args, kwargs)[0])


def _leaves(args: Any, kwargs: Any) -> list[Tensor]:
    return [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor) and x.dim()]
