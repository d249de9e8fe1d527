"""One network: captured or not, the share of its multiply-adds that may shrink, and what pins the rest.

Holds: building without filling weights, fake tensors, the share. Elsewhere: which networks there are.

An operator's multiply-adds count by the largest share of any one axis of its weight or operands whose channels are in
groups that may shrink: a product with a weight of which all rows, or all columns, may go counts in full. The share is
the sum over all contractions of a training pass, divided by all their multiply-adds.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from apoptosis.errors import CaptureError
from apoptosis.graph import analyse
from apoptosis.graph.rules.table import OPERATORS
from apoptosis.graph.trace.fakes import make_fake
from apoptosis.graph.trace.operators import Result, Rule
from apoptosis.graph.trace.tracer import Call
from apoptosis.records import Pin, Structure

LARGE = 1 << 16  # elements: smaller tensors are filled as ever, they may be constants that a pass reads
FEW, MOST = 2_000_000, 50_000_000  # parameters: run on real numbers first, and at all
_FILLS = frozenset(
    f"aten::{name}" for name in ("normal_", "uniform_", "erfinv_", "mul_", "add_", "clamp_", "fill_", "zero_")
)


@dataclass(frozen=True)
class Built:
    """A network and the arguments of one pass; note: what is worth saying of how it was built."""

    model: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


Building = Callable[[], AbstractContextManager[Any]]
"""What a network is built in."""


class _Unfilled(TorchDispatchMode):
    """Leaves the weights as the allocator gives them: they are never read; filling takes longer than the capture."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func._schema.name in _FILLS and args[0].numel() > LARGE and not isinstance(args[1:2] and args[1], Tensor):
            return args[0]
        return func(*args, **(kwargs or {}))


@contextmanager
def unfilled() -> Iterator[None]:
    """Build what is built inside without filling large weights.

    torch draws truncated normal numbers again until all are inside, which they never are where nothing draws.
    """
    init: Any = nn.init
    drawn = init._no_grad_trunc_normal_
    init._no_grad_trunc_normal_ = lambda t, *args, **kwargs: t if t.numel() > LARGE else drawn(t, *args, **kwargs)
    try:
        with _Unfilled():
            yield
    finally:
        init._no_grad_trunc_normal_ = drawn


def measure(candidates: Callable[[Building], Iterable[Built]]) -> dict[str, Any]:
    """All figures of the first of these networks whose own forward pass runs.

    Small ones on real tensors, which then is the quicker way, larger ones on fake tensors, and either on the other kind
    where its own pass fails (it reads numbers off its values, or the values are not what it expects). What fails in a
    plain pass as well is passed over; what fails in a capture alone is an error of the library.
    """
    start = time.process_time()
    row: dict[str, Any] = {"built": False, "captured": False, "error": ""}
    for built in candidates(unfilled):
        seconds_build = time.process_time() - start
        real = dict(_places(built.model))
        size = sum(tensor.numel() for tensor in real.values())
        few = size <= FEW or any(isinstance(m, nn.RNNBase) for m in built.model.modules())  # many small operators
        for fake in (False, True) if few else (True, False) if size <= MOST else (True,):
            run = faked(built) if fake else built
            if not fake:
                _restore(built.model, real)
            try:
                structure, log, seconds = _captured(run)
            except CaptureError as error:
                why = _fails(run)
                row["error"] = row["error"] or why
                if why:
                    continue
                row |= {"built": True, "error": str(error), "fake": fake, "note": built.note}
                return row | {"seconds": time.process_time() - start}
            row |= {"built": True, "captured": True, "error": "", "fake": fake, "note": built.note}
            return row | {"seconds_build": seconds_build, "seconds": seconds} | figures(built.model, structure, log)
    return row | {"seconds": time.process_time() - start}


def figures(model: nn.Module, structure: Structure, log: Sequence[_Contraction]) -> dict[str, Any]:
    """What a capture says, as plain values."""
    return {
        "share": share(structure, log),
        "convolutions": convolutional(log),
        "macs": structure.macs,
        "parameters": sum(p.numel() for p in model.parameters()),
        **_groups(structure),
    }


def _places(model: nn.Module) -> Iterator[tuple[tuple[nn.Module, str], Tensor]]:
    for module in model.modules():
        for named in (module._parameters, module._buffers):
            yield from (((module, name), tensor) for name, tensor in named.items() if tensor is not None)


def _restore(model: nn.Module, real: Mapping[tuple[nn.Module, str], Tensor]) -> None:
    """Put real tensors back in their places; those that were never filled are filled now."""
    with torch.no_grad():
        for (module, name), tensor in real.items():
            named = module._parameters if name in module._parameters else module._buffers
            named[name] = tensor
            if tensor.numel() > LARGE and tensor.is_floating_point():
                tensor.normal_(0.0, 0.02)


def _fails(built: Built) -> str:
    """Why a plain pass of the network fails, "" where it runs in both modes."""
    for training in (True, False):
        built.model.train(training)
        try:
            with torch.no_grad():
                built.model(*built.args, **built.kwargs)
        except Exception as error:  # noqa: BLE001 - a network may raise anything
            return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:300]
    return ""


def faked(built: Built) -> Built:
    """The network with fake tensors in the places of its parameters and buffers, and fake images for real ones.

    Whole numbers stay real: networks read sizes and masks off them.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    make_fake(built.model, mode)
    args, kwargs = tree_map_only(
        Tensor, lambda t: mode.from_tensor(t) if t.is_floating_point() else t, (built.args, dict(built.kwargs))
    )
    return Built(built.model, args, kwargs, built.note)


def _captured(built: Built) -> tuple[Structure, list[_Contraction], float]:
    start = time.process_time()
    with contractions() as log:
        structure = analyse(built.model, built.args, built.kwargs)
    return structure, log, time.process_time() - start


# ---------------------------------------------------------------- what a contraction reads


@dataclass(frozen=True)
class _Contraction:
    """One operator of a training pass. axes: (tensor, dim, positions) lists, one list per axis of an operand."""

    name: str
    macs: float
    axes: Sequence[Sequence[tuple[str, int, np.ndarray]]]


@contextmanager
def contractions() -> Iterator[list[_Contraction]]:
    """Note every operator that multiplies and adds in the training passes inside, and what its operands carry."""
    log: list[_Contraction] = []
    before = dict(OPERATORS)
    for name, operator in before.items():
        if operator.rule is not None:
            OPERATORS[name] = replace(operator, rule=_noted(operator.rule, log))
    try:
        yield log
    finally:
        OPERATORS.update(before)


def _noted(rule: Rule, log: list[_Contraction]) -> Rule:
    def run(call: Call) -> Result:
        trace, mode = call.trace, call.tracer.mode
        before = trace.macs[mode]
        try:
            return rule(call)
        finally:
            macs = trace.macs[mode] - before
            if macs and mode == "training":
                axes = [ids for tensor in call.tensors() for ids in _axes(call, tensor)]
                log.append(_Contraction(call.name, macs, [_positions(call, ids) for ids in axes]))

    return run


def _axes(call: Call, tensor: Tensor) -> list[np.ndarray]:
    view = call.view(tensor)
    if view is None:
        return [call.value(tensor).ids.reshape(-1)]
    return [np.unique(ids) for found in view.places() for ids in found.values()]


def _positions(call: Call, ids: np.ndarray) -> list[tuple[str, int, np.ndarray]]:
    channel_ids = call.trace.channel_ids
    unique, counts = np.unique(ids, return_counts=True)
    found = []
    for name, dim, here in channel_ids.axes_of(unique):
        found.append((name, dim, np.repeat(unique[here] - channel_ids.tensors[name].bases[dim], counts[here])))
    closed = ids.size - sum(positions.size for _, _, positions in found)
    return [*found, ("", 0, np.zeros(closed, dtype=np.int64))]


def share(structure: Structure, log: Sequence[_Contraction]) -> float | None:
    """The share of the multiply-adds that may shrink; None where there are none."""
    total = sum(one.macs for one in log)
    if not total:
        return None
    is_open = _open_classes(structure)
    free = 0.0
    for one in log:
        parts = [_open_share(structure, is_open, axis) for axis in one.axes]
        free += one.macs * max(parts, default=0.0)
    return free / total


def _open_classes(structure: Structure) -> np.ndarray:
    labels = [found for axes in structure.classes.values() for found in axes]
    size = 1 + max((int(found.max()) for found in labels if found.size), default=0)
    is_open = np.zeros(size, dtype=bool)
    for group in structure.groups:
        if group.pin is None:
            for member in group.members:
                is_open[structure.classes[member.tensor][member.dim][member.positions.reshape(-1)]] = True
            for site in group.sites:
                if site.weight and site.kind != "product":
                    is_open[structure.classes[site.weight][site.dim][site.columns.reshape(-1)]] = True
    return is_open


def _open_share(structure: Structure, is_open: np.ndarray, axis: Sequence[tuple[str, int, np.ndarray]]) -> float:
    size = sum(positions.size for _, _, positions in axis)
    free = sum(int(is_open[structure.classes[name][dim][positions]].sum()) for name, dim, positions in axis if name)
    return free / size if size else 0.0


def convolutional(log: Sequence[_Contraction]) -> float | None:
    """The share of the multiply-adds that convolutions do."""
    total = sum(one.macs for one in log)
    return sum(one.macs for one in log if one.name == "convolution") / total if total else None


# ---------------------------------------------------------------- groups and pins


def _groups(structure: Structure) -> dict[str, Any]:
    groups = [g for g in structure.groups if not g.name.endswith(":heads")]
    pins: dict[str, dict[str, Any]] = defaultdict(lambda: {"groups": 0, "channels": 0, "share": 0.0, "example": ""})
    for group in groups:
        if group.pin is not None:
            found = pins[shortened(group.pin)]
            found["groups"] += 1
            found["channels"] += group.num_channels
            found["share"] += group.macs_per_channel * group.num_channels / max(structure.macs, 1.0)
            found["example"] = found["example"] or f"'{group.name}': {group.pin.reason}"
    return {
        "groups": len(groups),
        "groups_free": sum(g.pin is None for g in groups),
        "channels": sum(g.num_channels for g in groups),
        "channels_free": sum(g.num_channels for g in groups if g.pin is None),
        "pins": dict(sorted(pins.items(), key=lambda item: -item[1]["share"])),
    }


def shortened(pin: Pin) -> str:
    """The operator and what it does, without names, places and numbers of single layers."""
    text = re.sub(r"^they are the network's output.*", "output", pin.reason)
    text = re.sub(r"operator (aten|\w+)\.(\w+)( in '[^']*')?", r"\2", text)
    text = re.sub(r" in '[^']*'|'[^']*' ?", " ", text)
    return re.sub(r"\s+", " ", re.sub(r"\d+", "n", text)).strip().rstrip(".").partition(": ")[0]
