"""Measures what a training step takes on this machine, and what it would take at other widths.

Holds: the table of timings (records.Timings): every contraction that can shrink is run, forward and backward, at its
full width and at three quarters, a half and a quarter of it; a pass of the model tells what the rest takes. Elsewhere:
what a step takes at given widths (planner/costs.py), finding the contractions (contractions.py), the multiply-adds that
an event costs (overhead.py).

Clocks are read here once; decisions are a function of the table, which is saved with the run.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from apoptosis.decide.contractions import Contraction, Recorded, recorded
from apoptosis.decide.overhead import macs_per_second
from apoptosis.model.evaluate import num_rows
from apoptosis.model.passes import device_of, internal_passes
from apoptosis.planner.costs import Costs, weight_macs
from apoptosis.records import Curve, Structure, Timings

_SHARES = (1.0, 0.75, 0.5, 0.25)  # of the channels along every axis that can shrink
_GRID = 12  # steps per octave that seconds are rounded to
_LIMIT = 0.5  # seconds that measuring may take, or three forward passes if that is longer
_REPEATS = 12  # at most; the best counts
_LEAST = 2  # at least, the first of which meets cold caches
_FEWEST = 64  # positions of a product of matrices that is timed, where that many are
_STEP = 3.0  # a training step takes that much of the rest of a forward pass: two parts of it are backward
_LAUNCH = 2.0  # an operator of the model takes that much of the time of one that has nothing to compute, by itself
_AROUND = 30  # operators that a step runs outside of the model: the loss, what clears gradients
_ELEMENTS = 1 << 18  # of the parameter that an optimizer's arithmetic is timed on

Call = tuple[tuple[Any, ...], dict[str, Any]]
Clock = Callable[[Callable[[], object]], float]


def measure_timings(
    model: nn.Module,
    call: Call,
    structure: Structure,
    optimizers: Iterable[Optimizer] = (),
    *,
    rows: int | None = None,
) -> Timings:
    """Measure what a training step takes; the model, its gradients and all random generators stay as they are.

    Contractions of one shape are timed once. It takes about half a second, or three forward passes if those take
    longer, and half a second, or two passes, for passes of the model. Seconds are rounded to 6 %, 12 steps an octave.

    Args:
        model: on the device where it is trained.
        call: (args, kwargs) of a forward pass.
        structure: of the model as it is now.
        optimizers: that train it: moments cost time, too.
        rows: examples of a training step; None: those of the call.

    Raises: whatever the model's forward pass raises.
    """
    device, own = device_of(model), num_rows(call)
    rows, clock = rows or own, _clock(device)
    found = recorded(model, call, structure)
    launch = _least(lambda: found.nothing.add(1.0), clock)
    forward = _forward_seconds(model, call, found, launch, clock)
    distinct = list(dict.fromkeys(one for calls in found.weights.values() for one in calls))
    with torch.autocast(device.type, enabled=False), torch.enable_grad():
        timed = _timed(distinct, rows / own, forward / max(structure.macs, 1.0), max(_LIMIT, 3 * forward), clock)
        per_parameter, per_tensor = _optimizer_seconds(optimizers, device, clock)
    curves, weights = _curves(found.weights, timed, structure)
    macs = sum(one.macs for calls in found.weights.values() for one in calls.elements())
    step = sum(timed[one][1][-1] for calls in found.weights.values() for one in calls.elements())
    passed = sum(timed[one][2] for calls in found.weights.values() for one in calls.elements())
    scale = rows / own
    per_mac = step / macs if macs else 3.0 * scale / macs_per_second(device)
    others = (structure.macs - macs) * per_mac / scale / 3.0
    rest = max(forward - passed / scale - others, 0.0)
    fixed = _LAUNCH * launch * found.num_operators
    per_element = _STEP * max(rest - fixed, 0.0) * scale / max(structure.elements, 1.0)
    tensors = sum(1 for _ in model.parameters())
    table = Timings(
        device=_words(device),
        threads=torch.get_num_threads(),
        rows=rows,
        curves=curves,
        weights=weights,
        per_mac=_rounded(per_mac),
        per_element=_rounded(per_element),
        per_parameter=_rounded(per_parameter),
        fixed=_rounded(_STEP * fixed + 2 * per_tensor * tensors + _AROUND * launch),
        step=0.0,
    )
    return replace(table, step=Costs(structure, table).of({}).seconds)


def _words(device: torch.device) -> str:
    return f"cuda: {torch.cuda.get_device_name(device)}" if device.type == "cuda" else device.type


def _rounded(seconds: float) -> float:
    """Round to a twelfth of an octave, so that a machine often gives the same figure again; 0.0 stays.

    Example:
        >>> _rounded(1.02), _rounded(0.0), round(_rounded(3.01), 3)
        (1.0, 0.0, 2.997)
    """
    return 2.0 ** (round(_GRID * math.log2(seconds)) / _GRID) if seconds > 0 else 0.0


def _clock(device: torch.device) -> Clock:
    """Return what times a call, in seconds.

    One thread of the CPU is timed by its own clock, which stands still while other programs run.
    """
    read = time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    wait: Callable[[], object] = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def clock(run: Callable[[], object]) -> float:
        wait()
        start = read()
        run()
        wait()
        return read() - start

    return clock


def _least(run: Callable[[], object], clock: Clock) -> float:
    """Return the least seconds of a call that takes microseconds, without those of the clock."""
    return max(min(clock(run) for _ in range(20)) - min(clock(lambda: None) for _ in range(20)), 0.0)


def _forward_seconds(model: nn.Module, call: Call, found: Recorded, launch: float, clock: Clock) -> float:
    """Return the seconds of a forward pass in training mode, the best of as many as half a second holds.

    What watching its operators takes (model.passes) is taken off; launch: seconds of one that has nothing to compute.
    """
    best, start, (args, kwargs) = math.inf, time.perf_counter(), call
    with internal_passes(model, training=True, drop=True, as_is=model.training):
        for _ in range(_REPEATS):
            best = min(best, clock(lambda: model(*args, **kwargs)))
            if time.perf_counter() - start > _LIMIT:
                break
        watched = _least(lambda: found.nothing.add(1.0), clock)
    return best - min(max(0.0, watched - launch) * found.num_operators, 0.9 * best)


Timed = tuple[tuple[float, ...], tuple[float, ...], float]
"""Shares of the multiply-adds, ascending; seconds forward and backward at each; seconds forward at the last, all."""


def _timed(
    distinct: Sequence[Contraction], scale: float, per_mac: float, limit: float, clock: Clock
) -> dict[Contraction, Timed]:
    """Time contractions at a few widths, in turn, the best of some.

    scale: rows of a training step for each one that was seen. per_mac: about how many seconds a multiply-add takes.
    limit: seconds for all.
    """
    points: list[tuple[Contraction, float, float, Callable[[], object]]] = []
    passes: list[tuple[Contraction, float, Callable[[], object]]] = []
    for one in distinct:
        widths = dict.fromkeys(one.narrowed(share) for share in _SHARES)
        full = one.macs * scale
        most = limit / (len(distinct) * (len(_SHARES) + 1) * (_LEAST + 2)) / max(3 * full * per_mac, 1e-12)
        rows = one.rows_of(scale, min(most, 1.0), _FEWEST)
        times = one.rows * scale / rows
        for outs, ins in widths:
            share = one.macs_at(outs, ins) / one.macs
            points.append((one, share, times, one.step(rows, outs, ins)))
        passes.append((one, times, one.forward(rows)))
    runs = [run for *_, run in points] + [run for *_, run in passes]
    best = _best(runs, limit, clock)
    found: dict[Contraction, Timed] = {}
    for (one, times, _), seconds in zip(passes, best[len(points) :], strict=True):
        mine = sorted((share, times * s) for (other, share, times, _), s in zip(points, best, strict=False)
                      if other is one)  # fmt: skip
        found[one] = (tuple(s for s, _ in mine), tuple(s for _, s in mine), times * seconds)
    return found


def _best(runs: Sequence[Callable[[], object]], limit: float, clock: Clock) -> list[float]:
    """Run all in turn, again and again; return the least seconds of each."""
    best, start = [math.inf] * len(runs), time.perf_counter()
    for repeat in range(_REPEATS):
        for place, run in enumerate(runs):
            best[place] = min(best[place], clock(run))
        if repeat + 1 >= _LEAST and time.perf_counter() - start > limit:
            break
    return best


def _curves(
    found: Mapping[str, Counter[Contraction]], timed: Mapping[Contraction, Timed], structure: Structure
) -> tuple[tuple[Curve, ...], dict[str, int]]:
    """Return different curves, and which is that of each weight; a weight that is used again and again adds up."""
    curves: dict[Curve, int] = {}
    weights: dict[str, int] = {}
    macs = weight_macs(structure)
    for name, calls in found.items():
        if name not in macs or not macs[name]:
            continue
        all_macs = sum(one.macs for one in calls.elements())
        shares, seconds = timed[next(iter(calls))][:2]
        if len(calls) > 1:  # of other shapes each: at the widths at which all were timed
            points = min(len(timed[one][0]) for one in calls)
            every = [timed[one] for one in calls.elements()]
            own = [one.macs for one in calls.elements()]
            shares = tuple(sum(m * t[0][i - points] for m, t in zip(own, every, strict=True)) / all_macs
                           for i in range(points))  # fmt: skip
            seconds = tuple(sum(t[1][i - points] for t in every) for i in range(points))
        else:
            seconds = tuple(s * calls.total() for s in seconds)
        curve = Curve(macs[name], shares, tuple(_rounded(s) for s in seconds))
        weights[name] = curves.setdefault(curve, len(curves))
    return tuple(curves), weights


def _optimizer_seconds(optimizers: Iterable[Optimizer], device: torch.device, clock: Clock) -> tuple[float, float]:
    """Return about what an optimizer takes per parameter, and per tensor: by its moments, and passes over memory."""
    moments = 0
    for optimizer in optimizers:
        asked = optimizer.defaults
        moments = max(moments, 2 if "betas" in asked or "momentum" not in asked else int(asked["momentum"] != 0))

    def run(p: Tensor, g: Tensor, m: Tensor, v: Tensor) -> Tensor:
        if moments > 0:
            m.lerp_(g, 0.1)
        if moments > 1:
            v.mul_(0.99).addcmul_(g, g)
            return p.addcdiv_(m, v.sqrt().add_(1e-8), value=-1e-6)
        return p.add_(m if moments else g, alpha=-1e-6)

    found = []
    with torch.no_grad():
        for size in (1, _ELEMENTS):
            p, g, m, v = (torch.full((size,), 0.01, device=device, dtype=torch.float32) for _ in range(4))
            found.append(min(clock(partial(run, p, g, m, v)) for _ in range(6)))
    return max(found[1] - found[0], 0.0) / _ELEMENTS, found[0]
