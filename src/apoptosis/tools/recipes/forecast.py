"""What a network has to gain before it is trained: how much of it may shrink, what that saves, what stands in the way.

Holds: shares of multiply-adds, and a forecast by the library's own table of timings. Elsewhere: the analysis (graph),
measuring the table (decide.timing), what other widths cost (planner.costs).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from apoptosis.decide.goal import FullSize, Goal, check_goal, share_of
from apoptosis.decide.policy import GOAL_SHARE
from apoptosis.decide.timing import measure_timings
from apoptosis.errors import ArgumentError
from apoptosis.graph import analyse
from apoptosis.model.evaluate import num_rows
from apoptosis.model.passes import device_of, internal_passes
from apoptosis.planner.costs import Cost, Costs, open_axes, weight_macs
from apoptosis.records import Group, Pin, ProductSite, Structure
from apoptosis.surgery.rehearsal import rehearse
from apoptosis.surgery.target import Target, exclude_pins, with_pins

Call = tuple[tuple[Any, ...], dict[str, Any]]
SHARES = (0.75, 0.5, 0.25)  # of the channels of every group
LEAST_BUY = 0.01  # of the multiply-adds, or of a step: a pin that holds less is not worth a line
MOST_PINS = 5
_STEPS = 5  # training steps that are timed, the best counts
_FORWARD, _LONGEST = 1.0, 5.0  # seconds of one forward pass, and of all training steps that are timed
_NOT_ASKED = ("output",)  # codes of pins that are no fault of the network


@dataclass(frozen=True, slots=True, kw_only=True)
class Width:
    """The network with every open group at a share of its width. macs: per example; seconds: of a training step."""

    share: float
    macs: float
    parameters: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """Pins of one kind. macs, seconds: shares of the whole, that halving their channels, too, would save."""

    groups: tuple[str, ...]
    channels: int
    reason: str
    where: str
    remedy: str
    macs: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What to expect of a network.

    macs, shrinkable: multiply-adds per example, of all and of layers that may shrink. step: seconds of a training step
    by the table, of `rows` examples; measured: by the clock. goal: what a target takes, or why it cannot be reached.
    """

    macs: float
    shrinkable: float
    parameters: float
    groups: tuple[int, int]
    channels: tuple[int, int]
    rows: int
    step: float
    measured: float | None
    table: str
    widths: tuple[Width, ...]
    held: tuple[Held, ...]
    goal: str = ""
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def forecast(
    model: nn.Module,
    call: Call,
    small: Call,
    optimizer: Optimizer,
    step: Callable[[], object] | None = None,
    *,
    goal: Goal | None = None,
    align: int = 8,
    exclude: Sequence[str] = (),
) -> Forecast:
    """Say what to expect of a network, by its structure and a table of timings; it takes seconds.

    Args:
        model: of full width; `step` trains it, all else leaves it as it was.
        call: (args, kwargs) with as many examples as a training step has.
        small: the same with two, for finding the structure.
        optimizer: of the model.
        step: a training step on `call`, to be timed; None: only the table tells.
        goal: a size that is to be reached.
        align: widths are multiples of it.
        exclude: groups to leave alone.

    Raises: whatever the model's forward pass raises.
    """
    target = Target(model=model, optimizers=(optimizer,), call=small)
    captured = analyse(model, *small)
    tried = rehearse(target, captured, exclude_pins(captured, tuple(exclude)), align, branches=False)
    structure = tried
    if num_rows(call) != num_rows(small):
        structure = with_pins(analyse(model, *call), {g.name: g.pin for g in tried.groups if g.pin is not None})
    timings = measure_timings(model, call, structure, (optimizer,))
    costs, rows = Costs(structure, timings), num_rows(call)
    full, free = costs.of({}), [g for g in structure.open_groups if not _is_whole(g)]
    halves = _narrow(free, 0.5, align)
    every = [g for g in structure.groups if not _is_whole(g)]
    return Forecast(
        macs=full.macs / rows,
        shrinkable=shrinkable_macs(structure) / rows,
        parameters=full.parameters,
        groups=(len(free), len(every)),
        channels=(sum(g.num_channels for g in free), sum(g.num_channels for g in every)),
        rows=rows,
        step=full.seconds,
        measured=None if step is None else _best(step, device_of(model)),
        table=f"{timings.device}, {timings.threads} threads",
        widths=tuple(_width(share, costs.of(_narrow(free, share, align)), rows) for share in SHARES),
        held=tuple(_held(structure.groups, costs, halves, full, align)),
        goal="" if goal is None else _goal_words(goal, structure, costs, free, align, rows),
        notes=structure.notes,
    )


def shrinkable_macs(structure: Structure) -> float:
    """Return the multiply-adds, per pass of the example input, of all that loses work when groups lose channels.

    These are the contractions with a weight that has channels of an open group along an axis, whole, since either axis
    takes work away, and the products of two activations over channels of such groups.

    Example:
        >>> from torch import nn, zeros
        >>> net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2), nn.Softmax(1), nn.Linear(2, 5))
        >>> shrinkable_macs(analyse(net, (zeros(1, 4),), {}))
        36.0
    """
    macs = weight_macs(structure)
    weights = sum(macs.get(name, 0.0) for name in open_axes(structure))
    products = 0.0
    for group in structure.open_groups:
        if not _is_whole(group):  # heads: the same products once more
            own = group.product_macs or sum(s.macs for s in group.sites if isinstance(s, ProductSite))
            products += own * group.num_channels
    return min(weights + products, structure.macs)


def _is_whole(group: Group) -> bool:
    return group.name.partition("#")[0].endswith(":heads")


def _narrow(groups: Iterable[Group], share: float, align: int) -> dict[str, int]:
    """Return the channels that stay of every group: a share, rounded up to a multiple of `align`."""
    return {
        g.name: min(g.num_channels, max(g.min_channels, math.ceil(share * g.num_channels / align) * align))
        for g in groups
    }


def _width(share: float, cost: Cost, rows: int) -> Width:
    return Width(share=share, macs=cost.macs / rows, parameters=cost.parameters, seconds=cost.seconds)


def _held(groups: Sequence[Group], costs: Costs, halves: Mapping[str, int], full: Cost, align: int) -> list[Held]:
    """Return the pins that hold most, those of one kind together: what halving their channels, too, would save."""
    kinds: dict[tuple[str, ...], list[tuple[Group, Pin]]] = {}
    for group in groups:
        pin = group.pin
        if pin is not None and pin.remedy and pin.code not in _NOT_ASKED:
            kinds.setdefault((pin.code, pin.operator, pin.remedy), []).append((group, pin))
    without, found = costs.of(halves), list[Held]()
    for alike in kinds.values():
        cost = costs.of({**halves, **_narrow((group for group, _ in alike), 0.5, align)})
        first = max(alike, key=lambda one: one[0].num_channels * one[0].macs_per_channel)[1]
        found.append(
            Held(
                groups=tuple(group.name for group, _ in alike),
                channels=sum(group.num_channels for group, _ in alike),
                reason=first.reason,
                where=first.where,
                remedy=first.remedy,
                macs=(without.macs - cost.macs) / full.macs if full.macs else 0.0,
                seconds=(without.seconds - cost.seconds) / full.seconds if full.seconds else 0.0,
            )
        )
    worth = [one for one in found if max(one.macs, one.seconds) >= LEAST_BUY]
    return sorted(worth, key=lambda one: (-one.seconds, -one.macs))[:MOST_PINS]


def affordable_rows(model: nn.Module, small: Call, rows: int) -> int:
    """Return how many examples a pass of about a second has, `rows` at most; small: (args, kwargs) of a few."""
    args, kwargs = small
    with internal_passes(model):
        model(*args, **kwargs)
        start = time.perf_counter()
        model(*args, **kwargs)
        seconds = (time.perf_counter() - start) / max(1, num_rows(small))
    return max(2, min(rows, int(_FORWARD / max(seconds, 1e-9))))


def _best(step: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of a training step, by the clock that the table is measured with: the best of a few."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    read = time.thread_time if alone else time.perf_counter
    best, began = math.inf, time.perf_counter()
    for number in range(_STEPS):
        start = read()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, read() - start)
        if number and time.perf_counter() - began > _LONGEST:
            break
    return best


def _goal_words(goal: Goal, structure: Structure, costs: Costs, free: Sequence[Group], align: int, rows: int) -> str:
    """Say what reaching a goal takes if every group gives the same share, and what that does to a run."""
    full = costs.of({})
    size = FullSize(parameters=round(full.parameters), macs=full.macs / rows, timings=costs.timings)
    try:
        check_goal(goal, structure, size, rows, lambda group: min(group.num_channels, max(align, group.min_channels)))
    except ArgumentError as error:
        return str(error)
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        above = share_of(goal, costs.of(_narrow(free, middle, align)), size, rows) > goal.share
        low, high = (low, middle) if above else (middle, high)
    cost = costs.of(_narrow(free, low, align))
    step = cost.seconds / full.seconds if full.seconds else 1.0
    run = 1 / (GOAL_SHARE + (1 - GOAL_SHARE) * step)
    return (
        f"target {goal}: about {100 * low:.0f} % of the channels of every group stay (which give more, the data say); "
        f"by the table a step is then {1 / step:.2f}x faster, and a whole run {run:.2f}x, as the size is reached after "
        f"{100 * GOAL_SHARE:.0f} % of it"
    )
