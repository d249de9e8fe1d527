"""The trials of one task: what is removed at which step, and what is written down of each.

Holds: the list of trials at a point, their records. Elsewhere: how something is removed (removal.py), training on
(training.py), what the records say together (fit.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.aftermath.removal import Seen, known, left_without, look, plan_of, without, without_branch
from benchmarks.aftermath.tasks import Task
from benchmarks.aftermath.training import Run, differences, go_on, moved, outputs, windows

SHARES = (0.25, 0.5, 0.75)
NOISE = 1e-5  # relative, of a twin that loses nothing: what differences of the loss are worth
LONG_POINTS = (0.1, 0.3)  # at which some trials go on to the end of the run
BATCHES = 3  # of training, on which outputs are compared at once
Record = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One removal. what: "group" (with those tied to it), "all" groups, "half" of them, "branch", "noise".

    names: groups, or the module that ends a branch. share: of the channels that go. goes_on: whether training goes on.
    """

    what: str
    names: tuple[str, ...]
    share: float
    goes_on: bool

    @property
    def label(self) -> str:
        return f"{self.what}|{self.names[0] if self.what in ('group', 'branch') else '*'}|{self.share}"


def spread(items: Sequence[Any], number: int) -> list[Any]:
    """Return so many of the items, evenly spread, first and last among them."""
    if len(items) <= number:
        return list(items)
    return [items[round(i * (len(items) - 1) / max(1, number - 1))] for i in range(number)]


def trials_of(task: Task, seen: Seen, point: int, *, long: bool) -> Iterator[Trial]:
    """Yield the trials at one point; long: those few that go on to the end of the run."""
    units = spread(seen.units(), task.units)
    names = tuple(name for unit in seen.units() for name in unit)
    if long:
        yield from (Trial(what="all", names=names, share=share, goes_on=True) for share in SHARES[1:])
        chosen = dict.fromkeys([*spread(units, 3), *spread(units[1:-1], 2)])
        yield from (Trial(what="group", names=unit, share=0.75, goes_on=True) for unit in chosen)
        yield from (Trial(what="branch", names=(name,), share=1.0, goes_on=True) for name in spread(task.branches, 2))
        yield Trial(what="noise", names=("",), share=0.0, goes_on=True)
        return
    tried = spread(units[point % 2 :], task.tried)  # those of one point and the next differ
    for share in reversed(SHARES):
        yield Trial(what="all", names=names, share=share, goes_on=share > SHARES[0])
        half = tuple(name for unit in units[::2] for name in unit)
        yield Trial(what="half", names=half, share=share, goes_on=False)
        for unit in units:
            enough = SHARES[0] if task.k else SHARES[1]
            yield Trial(what="group", names=unit, share=share, goes_on=share > enough and unit in tried)
    branches = spread(task.branches[point % 2 :], 2 if task.k else 1)
    yield from (Trial(what="branch", names=(name,), share=1.0, goes_on=True) for name in branches)
    if task.k or not point:
        yield Trial(what="noise", names=("",), share=0.0, goes_on=True)


class Bank:
    """All trials of one task, in one run of the untouched network.

    Args:
        task: of the bank. seed: of the initial weights. done: keys of trials that are written down. write: takes one.
    """

    def __init__(self, task: Task, seed: int, done: set[str], write: Callable[[Record], None]) -> None:
        self._task, self._seed, self._done, self._write = task, seed, done, write
        self._run = Run.begin(task, seed)
        self._losses: list[float] = []  # of the untouched run, by step

    @property
    def _step(self) -> int:
        return len(self._losses)

    def trials(self, *, long: bool = False) -> None:
        """Train up to every point, and make the trials there that are not done yet; then train to the end."""
        for number, share in enumerate(self._task.points):
            self._train_to(round(share * self._task.steps))
            seen, losses = look(self._run, self._step)
            self._losses += losses
            print(f"{self._task.name}, step {self._step}: {len(seen.open)} of {len(seen.structure.groups)} groups, "
                  f"window of {len(losses)} steps", flush=True)  # fmt: skip
            if long and share not in LONG_POINTS:
                continue
            self._at(seen, number, f"{self._task.name}|{self._seed}|{share}", long=long)
        key = f"{self._task.name}|{self._seed}|curve"
        if key not in self._done:
            self._train_to(self._task.steps)
            self._write({"key": key, "task": self._task.name, "curve": self._losses})

    def _train_to(self, step: int) -> None:
        while self._step < step:
            self._losses.append(self._run.step(self._step))

    def _at(self, seen: Seen, number: int, where: str, *, long: bool) -> None:
        task, run = self._task, self._run
        recent = [task.batch(self._step - 1 - i) for i in range(BATCHES)]
        before = outputs(run.model, recent, batch_statistics=True), outputs(run.model, task.held_out)
        left = task.steps - self._step
        k = left if long or not task.k else min(task.k, left)
        base: tuple[list[float], float] | None = None
        for trial in trials_of(task, seen, number, long=long):
            key = f"{where}|{'long|' if long else ''}{trial.label}"
            if key in self._done:
                continue
            start = time.process_time()
            found, info = self._removed(seen, trial)
            if isinstance(found, str):
                self._write({"key": key, "task": task.name, "skipped": found})
                continue
            record: Record = {"key": key, "task": task.name, "pretrained": task.pretrained, "what": trial.what,
                              "name": trial.names[0], "share": trial.share, "depth": self._depth(seen, trial), **info,
                              **self._when()}  # fmt: skip
            record["at_once"] = moved(before[0], outputs(found.model, recent, batch_statistics=True))
            record["at_once_held_out"] = moved(before[1], outputs(found.model, task.held_out))
            if trial.goes_on:
                if base is None:
                    base = go_on(run.twin(), self._step, k)
                losses, held_out = go_on(found, self._step, k)
                record |= {"k": k, "later": differences(losses, base[0]), "later_held_out": held_out - base[1],
                           "rate_sums": [self._rate_sum(a, b) for a, b in windows(k)]}  # fmt: skip
            record["seconds"] = time.process_time() - start
            self._write(record)

    def _removed(self, seen: Seen, trial: Trial) -> tuple[Run | str, Record]:
        if trial.what == "noise":
            twin = self._run.twin()
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for p in twin.model.parameters():
                    p.mul_(1 + NOISE * torch.randn(p.shape, generator=generator))
            return twin, {}
        if trial.what == "branch":
            name = trial.names[0]
            return without_branch(self._run, name, self._step), {"macs_left": left_without(seen, name)}
        plan = plan_of(self._run, seen, trial.names, trial.share)
        if not plan.reductions:
            return "nothing can be removed by this share", {}
        return without(self._run, seen, plan), known(self._run, seen, plan)

    def _when(self) -> Record:
        rates = [self._task.schedule(s / self._task.steps) for s in range(self._task.steps)]
        return {"step": self._step, "steps": self._task.steps, "rate": rates[self._step],
                "rate_left": sum(rates[self._step :]) / sum(rates)}  # fmt: skip

    def _rate_sum(self, first: int, end: int) -> float:
        """Learning rate spent from the removal to the middle of a window, as a share of the whole run's."""
        rates = [self._task.schedule(s / self._task.steps) for s in range(self._task.steps)]
        middle = self._step + (first + end) // 2
        return sum(rates[self._step : middle]) / sum(rates)

    def _depth(self, seen: Seen, trial: Trial) -> float | None:
        """Where in the network, 0 first and 1 last."""
        names = [g.name for g in seen.structure.groups] if trial.what == "group" else list(self._task.branches)
        if trial.what not in ("group", "branch") or trial.names[0] not in names:
            return None
        return names.index(trial.names[0]) / max(1, len(names) - 1)
