"""Which methods a task has, and what each of them needs of others.

Holds: the table of methods by name. Elsewhere: what a method does (methods), the order of training (cells).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from apoptosis.errors import ArgumentError
from benchmarks.paper.methods import CRITERIA, FineTuning, Lasso, Pruning, Shrinking, small
from benchmarks.paper.tasks import Task, TaskData
from benchmarks.paper.training import MethodRun

TARGETS = ("1.5x", "2x", "3x")  # of the multiply-adds, asked of apoptosis by name
Runs = Mapping[str, Any]  # name -> MethodRun of this cell, as far as they are made


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One way to train the task.

    make: runs of the cell so far -> the run. beside: a method that it follows turn by turn. after: methods that have to
    be finished before it begins.
    """

    name: str
    make: Callable[[Runs], MethodRun]
    beside: tuple[str, ...] = ()
    after: tuple[str, ...] = ()


def methods_of(task: Task, data: TaskData, seed: int, *, criteria: bool = True) -> dict[str, Method]:
    """Return the task's methods by name, in the order in which they train within a turn."""
    at = (task, data, seed)
    found = [
        Method(name="dense", make=lambda runs: MethodRun("dense", *at)),
        Method(name="apoptosis", make=lambda runs: Shrinking("apoptosis", *at)),
        _following("torch-pruning", Pruning, "apoptosis", *at),
    ]
    if task.kind:
        for target in TARGETS:
            name = f"apoptosis, {target}"
            found += [_shrinking(name, *at, target=target), _following(f"torch-pruning, {target}", Pruning, name, *at)]
    found += [_fewer(name, build, *at) for name, build in task.fewer.items()]
    if (task.core or task.kind) and not task.pretrained:
        found.append(Method(name="half width", make=lambda runs: MethodRun("half width", *at, scale=0.5)))
    if task.core or task.kind:
        found.append(_following("group lasso", Lasso, "apoptosis", *at))
    if task.core and criteria and seed == 0:
        found += [_shrinking(f"apoptosis, {name}", *at, criterion=name) for name in CRITERIA]
    found += _late(task)
    return {method.name: method for method in found}


def _late(task: Task) -> list[Method]:
    """What needs the result of others."""
    found = [
        Method(name="same widths", make=lambda runs: small("same widths", runs["apoptosis"]), after=("apoptosis",))
    ]
    if task.core:
        found += [
            Method(
                name="train-prune-fine-tune",
                make=lambda runs: FineTuning("train-prune-fine-tune", runs["dense"], runs["apoptosis"].macs()),
                after=("dense", "apoptosis"),
            ),
            Method(name="same widths, longer", make=_longer, after=("apoptosis", "same widths")),
        ]
    if task.kind:
        found.append(Method(name="dense, shorter", make=_shorter, after=("dense", "apoptosis")))
    return found


def _longer(runs: Runs) -> MethodRun:
    """For as long as apoptosis took, at the pace of these very widths."""
    own, same = runs["apoptosis"], runs["same widths"]
    return small("same widths, longer", own, epochs=own.task.epochs * own.seconds / same.seconds)


def _shorter(runs: Runs) -> MethodRun:
    """The dense network with its schedule fitted to the time that apoptosis took; at most as long as dense.

    On one thread that is processor time, which other work on the machine changes least.
    """
    dense, own = runs["dense"], runs["apoptosis"]
    clock = "cpu_seconds" if torch.get_num_threads() == 1 else "seconds"
    epochs = dense.task.epochs * min(1.0, getattr(own, clock) / getattr(dense, clock))
    return MethodRun("dense, shorter", dense.task, dense.data, dense.seed, epochs=epochs)


def _shrinking(name: str, task: Task, data: TaskData, seed: int, **options: Any) -> Method:
    return Method(name=name, make=lambda runs: Shrinking(name, task, data, seed, **options))


def _following(name: str, kind: type[Pruning], of: str, task: Task, data: TaskData, seed: int) -> Method:
    return Method(name=name, make=lambda runs: kind(name, task, data, seed, runs[of].macs), beside=(of,))


def _fewer(name: str, build: Callable[[TaskData], Any], task: Task, data: TaskData, seed: int) -> Method:
    return Method(name=name, make=lambda runs: fewer(name, build, task, data, seed))


def fewer(name: str, build: Callable[[TaskData], Any], task: Task, data: TaskData, seed: int) -> MethodRun:
    """Return the pretrained network with fewer layers from the start; what is new in it is drawn by the seed."""
    torch.manual_seed(seed)
    return MethodRun(name, task, data, seed, model=build(data))


def chosen(methods: Mapping[str, Method], names: Iterable[str] | None) -> dict[str, Method]:
    """Return the named methods, all without names, and dense and those that they need.

    Raises: ArgumentError: no method of this task has one of these names.
    """
    if names is None:
        return dict(methods)
    wanted = ["dense", *names]
    for name in wanted:  # grows as it goes
        if name not in methods:
            raise ArgumentError(f"unknown method '{name}'; there are {'; '.join(methods)}.")
        wanted += [needed for needed in (*methods[name].beside, *methods[name].after) if needed not in wanted]
    return {name: method for name, method in methods.items() if name in wanted}
