"""The network's outputs before and after surgery, compared on probe examples.

Lives here: reading classes off outputs, slicing a probe, running the model without leaving a trace, comparing
outputs. Does not live here: counting and what follows from it (numerics.bounds) or who rolls back (engine).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only, tree_unflatten

from apoptosis.errors import ArgumentError, NonFiniteError, RankError
from apoptosis.numerics.bounds import compare_logits
from apoptosis.passes import own_pass
from apoptosis.sharded import gathered

ReadLogits = Callable[[Any], Tensor]
CHUNK = 256  # examples per forward pass over a probe


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Probe:
    """Inputs (positional and keyword) of `rows` examples along dimension 0, with labels where there are any."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    labels: Tensor | None
    rows: int
    held_out: bool

    def take(self, start: int, stop: int) -> Probe:
        """Examples start..stop as a probe of their own."""

        def cut(x: Any) -> Any:
            return x[start:stop] if isinstance(x, Tensor) and x.dim() and x.shape[0] == self.rows else x

        labels = None if self.labels is None else self.labels[start:stop]
        args, kwargs = tree_map(cut, (self.args, dict(self.kwargs)))
        return Probe(args=args, kwargs=kwargs, labels=labels, rows=stop - start, held_out=self.held_out)


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """How far the outputs moved. rms: relative to the centred output; flips, losses: numbers of examples.

    flips: examples whose largest output changed. losses: right before and wrong after (equal to flips where labels are
    missing). margin_share: share of examples whose two largest logits differ by at most twice the largest change of a
    logit. readable: whether the outputs have columns to compare, one row per example. moved, spread: squared sums, the
    root of whose ratio is rms.
    """

    rms: float
    rows: int
    flips: int
    losses: int
    margin_share: float
    readable: bool
    moved: float = 0.0
    spread: float = 0.0


def as_call(example: Any, what: str = "example input") -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Turn an example input (tensor, tuple of arguments or dict of keyword arguments) into (args, kwargs).

    Raises: ArgumentError: it is neither, or its tensors hold no example.
    """
    tensors = [leaf for leaf in tree_flatten(example)[0] if isinstance(leaf, Tensor) and leaf.dim()]
    if tensors and all(leaf.shape[0] == 0 for leaf in tensors):
        raise ArgumentError(f"{what}: its tensors hold no example (0 rows).")
    if isinstance(example, Mapping):
        if not all(isinstance(key, str) for key in example):
            raise ArgumentError("example input: a dict is taken as keyword arguments, so its keys must be strings.")
        return (), dict(example)
    if isinstance(example, tuple):
        return example, {}
    if isinstance(example, Tensor):
        return (example,), {}
    raise ArgumentError(
        f"example input is a {type(example).__name__}: give a tensor, a tuple of arguments or a dict of keyword "
        "arguments, as you would call the model."
    )


def num_rows(call: Any) -> int:
    """Examples in a call: the size of dimension 0 of its first tensor."""
    tensors = [leaf for leaf in tree_flatten(call)[0] if isinstance(leaf, Tensor) and leaf.dim()]
    return int(tensors[0].shape[0]) if tensors else 0


def make_probe(probe: Any, example: Any) -> Probe:
    """Read what the user gave as `probe`: inputs of the form of the example input, or (inputs, labels).

    Raises: ArgumentError: neither form fits.
    """
    labels = None
    inputs = probe
    is_pair = isinstance(probe, list | tuple) and len(probe) == 2
    if is_pair and (not isinstance(example, tuple) or isinstance(probe[0], tuple)):
        inputs, labels = probe
    form = Tensor if isinstance(example, Tensor) else tuple if isinstance(example, tuple) else Mapping
    if not isinstance(inputs, form) or (isinstance(example, tuple) and len(inputs) != len(example)):
        raise ArgumentError(
            f"probe: expected inputs of the form of example_input ({type(example).__name__}) or (inputs, labels), "
            f"got {type(probe).__name__}."
        )
    args, kwargs = as_call(inputs, "probe")
    rows = num_rows((args, kwargs))
    if rows == 0:
        raise ArgumentError("probe holds no examples along dimension 0.")
    if labels is not None and (not isinstance(labels, Tensor) or labels.dim() != 1 or len(labels) != rows):
        raise ArgumentError(f"probe labels must be a tensor of shape ({rows},): one class index per example.")
    if labels is not None:
        check_labels(labels, None)
    return Probe(args=args, kwargs=kwargs, labels=labels, rows=rows, held_out=True)


def check_labels(labels: Tensor, classes: int | None) -> None:
    """Check that labels are class indices, below `classes` where that is known.

    Raises: ArgumentError: another dtype, or an index out of range.
    """
    if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
        raise ArgumentError(f"probe labels are of dtype {labels.dtype}: give class indices (an integer dtype).")
    low, high = (int(labels.min()), int(labels.max())) if len(labels) else (0, 0)
    if low < 0 or (classes is not None and high >= classes):
        allowed = "0 or more" if classes is None else f"0 .. {classes - 1}"
        raise ArgumentError(f"probe labels range over {low} .. {high}: class indices must be {allowed}.")


def check_runs(model: nn.Module, probe: Probe, read: ReadLogits | None = None) -> None:
    """Run the model on a few probe examples, in two sizes: its outputs must have a row for each of them.

    Raises: ArgumentError: it fails on them, the outputs have other rows, or labels name no class of the outputs.
    """
    for rows in (min(2, probe.rows), min(3, probe.rows)):  # two passes on every rank, which may gather for them
        part = probe.take(0, rows)
        try:
            (out,) = outputs(model, part)
        except RankError:
            raise
        except Exception as error:  # the user's forward may raise anything
            raise ArgumentError(f"probe: the model fails on it: {type(error).__name__}: {error}") from error
        logits = logits_of(out, read)
        _check_rows(out, logits, rows)
        if logits is not None and probe.labels is not None:
            check_labels(probe.labels, logits.shape[1])


def _check_rows(out: Any, logits: Tensor | None, rows: int) -> None:
    """Raise ArgumentError unless what is read off the output has one row per example."""
    found = [len(x) for x in ([logits] if logits is not None else _leaves(out)) if x.dim()]
    if rows not in found:
        raise ArgumentError(
            f"probe: {rows} rows of the inputs give outputs of {found[0] if found else 'no'} rows. Dimension 0 of the "
            "inputs must count examples, and the outputs (or what logits= reads) must have one row for each."
        )


def like_example(
    call: tuple[tuple[Any, ...], Mapping[str, Any]], example: tuple[tuple[Any, ...], Mapping[str, Any]]
) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """Cast inputs to the floating dtypes of the example: under autocast a loop may hand over others."""
    leaves, form = tree_flatten(call)
    wanted, other = tree_flatten(example)
    if form != other:
        return call
    cast = [
        x.to(like.dtype) if isinstance(x, Tensor) and isinstance(like, Tensor) and x.is_floating_point() else x
        for x, like in zip(leaves, wanted, strict=True)
    ]
    args, kwargs = tree_unflatten(cast, form)
    return args, kwargs


@contextmanager
def without_trace(model: nn.Module) -> Iterator[None]:
    """Run in evaluation mode without gradients; random states, buffers and every module's mode stay as they were."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(module, dict(module._buffers)) for module, _ in modes if module._buffers]
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    python, numpy = random.getstate(), np.random.get_state()
    with own_pass(), torch.no_grad(), torch.random.fork_rng(devices=sorted(d for d in devices if d is not None)):
        try:
            for module, _ in modes:
                module.training = False
            clones: dict[int, Tensor] = {}  # a module may count or average in evaluation mode too
            for module, own in buffers:
                for name, buffer in own.items():
                    if buffer is not None:
                        module._buffers[name] = clones.setdefault(id(buffer), buffer.detach().clone())
            torch.clear_autocast_cache()  # an enclosing autocast may hold casts of weights from before the last step
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for module, own in buffers:
                module._buffers.clear()
                module._buffers.update(own)
            torch.clear_autocast_cache()  # casts made here carry no gradients
            random.setstate(python)
            np.random.set_state(numpy)


def outputs(model: nn.Module, probe: Probe, *, chunk: int = CHUNK, passes: int = 0) -> list[Any]:
    """Return the model's outputs in evaluation mode, in chunks of examples; leaves no trace on the model.

    passes: how many are made at least, where other ranks, which gather parameters at the same time, make more.
    """
    found = []
    with without_trace(model), gathered(model):
        for start in range(0, probe.rows, chunk):
            part = probe.take(start, min(start + chunk, probe.rows)) if probe.rows > chunk else probe
            args, kwargs = tree_map_only(Tensor, Tensor.clone, (part.args, dict(part.kwargs)))  # it may write to them
            found.append(model(*args, **kwargs))
        for _ in range(len(found), passes):
            model(*args, **kwargs)
    return found


def _leaves(out: Any) -> list[Tensor]:
    leaves = [x for x in tree_flatten(out)[0] if isinstance(x, Tensor) and x.is_floating_point()]
    if leaves:
        return leaves
    values = vars(out).values() if hasattr(out, "__dict__") else ()  # a plain object of tensors
    return [x for x in values if isinstance(x, Tensor) and x.is_floating_point()]


def logits_of(out: Any, read: ReadLogits | None) -> Tensor | None:
    """(examples, classes) logits, or None where the output has none: one tensor of two dimensions with >= 2 columns."""
    if read is not None:
        logits = read(out)
        if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[1] < 2:
            raise ArgumentError("logits=: the function must return a tensor of shape (examples, classes >= 2).")
        return logits
    named = getattr(out, "logits", None)
    if isinstance(named, Tensor) and named.dim() == 2 and named.shape[1] >= 2:
        return named
    leaves = _leaves(out)
    if len(leaves) == 1 and leaves[0].dim() == 2 and leaves[0].shape[1] >= 2:
        return leaves[0]
    return None


def compare(
    before: list[Any],
    after: list[Any],
    labels: Tensor | None,
    read: ReadLogits | None,
    *,
    probe: Probe | None = None,
) -> Change:
    """How far the outputs moved between two passes over the same examples.

    Args:
        before: what `outputs` returned.
        after: the same after surgery.
        labels: (examples,) class indices, or None.
        read: as logits=.
        probe: what the passes were made on. Outputs without a row for each example then bound nothing.

    Raises:
        NonFiniteError: the outputs before hold NaN or infinity (after: the change is infinite).
        ArgumentError: a held-out probe and outputs of other rows, or labels that name no class.
    """
    moved, spread = _squares(before, after)
    rows = flips = losses = close = 0
    readable = True
    for i, (old, new) in enumerate(zip(before, after, strict=True)):
        a, b = logits_of(old, read), logits_of(new, read)
        size = num_rows(_leaves(old)) if a is None else len(a)
        if probe is not None:
            size = min(CHUNK, probe.rows - i * CHUNK)
            for out, logits in ((old, a), (new, b)):
                if probe.held_out:
                    _check_rows(out, logits, size)
                readable = readable and logits is not None and len(logits) == size
        if readable and a is not None and b is not None:
            truth = None if labels is None else labels[rows : rows + size]
            if truth is not None:
                check_labels(truth, a.shape[1])
            found = compare_logits(a, b, truth)
            flips, losses, close = flips + found.flips, losses + found.losses, close + found.at_risk
        else:
            readable = False
        rows += size
    return Change(
        rms=_root_of(moved, spread),
        moved=moved,
        spread=spread,
        rows=rows,
        flips=flips,
        losses=losses,
        margin_share=close / rows if readable and rows else 1.0,
        readable=readable and rows > 0,
    )


def together(changes: Sequence[Change]) -> Change:
    """Return what changed on several sets of examples as one."""
    if len(changes) == 1:
        return changes[0]
    rows = sum(change.rows for change in changes)
    moved, spread = sum(change.moved for change in changes), sum(change.spread for change in changes)
    return Change(
        rms=_root_of(moved, spread),
        moved=moved,
        spread=spread,
        rows=rows,
        flips=sum(change.flips for change in changes),
        losses=sum(change.losses for change in changes),
        margin_share=sum(change.margin_share * change.rows for change in changes) / max(rows, 1),
        readable=all(change.readable for change in changes),
    )


def _root_of(moved: float, spread: float) -> float:
    if not moved < float("inf"):
        return float("inf")
    return (moved / spread) ** 0.5 if spread > 0 else (0.0 if moved == 0 else float("inf"))


def _squares(before: list[Any], after: list[Any]) -> tuple[float, float]:
    """Return the squared change and the squared spread of the outputs, all their tensors together."""
    change = scale = 0.0
    for old, new in zip(before, after, strict=True):
        for x, y in zip(_leaves(old), _leaves(new), strict=True):
            x, y = x.double(), y.double()
            if not bool(torch.isfinite(x).all()):
                raise NonFiniteError("the network's outputs on the probe hold NaN or infinity before any change.")
            change += float((y - x).square().sum())
            alone = len(before) == 1 and x.dim() and x.shape[0] == 1  # one example has no spread: take its size
            scale += float((x if alone else x - x.mean(0, keepdim=True)).square().sum())
    return change, scale


def has_classes(model: nn.Module, call: tuple[tuple[Any, ...], Mapping[str, Any]], read: ReadLogits | None) -> bool:
    """Whether logits, one row per example, can be read off the model's output on the example input."""
    example = Probe(args=call[0], kwargs=call[1], labels=None, rows=max(1, num_rows(call)), held_out=False)
    logits = logits_of(outputs(model, example, chunk=example.rows)[0], read)
    return logits is not None and len(logits) == example.rows
