"""The network's outputs before and after surgery, compared on probe examples.

Holds: reading classes off outputs, slicing a probe, running the model on it, comparing outputs. Elsewhere: what an
output holds (outputs), leaving no trace (passes), counting and what follows from it (numerics.bounds), rolling back
(engine).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from apoptosis.errors import ArgumentError, NonFiniteError, OutOfMemoryError, RankError
from apoptosis.interrupts import is_out_of_memory
from apoptosis.model.kept import run_fitted
from apoptosis.model.outputs import Change, ReadLogits, difference, is_masked, read_logits
from apoptosis.model.outputs import read as read_output
from apoptosis.model.passes import internal_passes
from apoptosis.numerics.bounds import compare_logits

Call = tuple[tuple[Any, ...], Mapping[str, Any]]  # positional and keyword arguments of a forward pass
CHUNK = 256  # examples of a held-out probe per forward pass


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Probe:
    """Inputs (positional and keyword) of `rows` examples, with labels where there are any.

    cut: for every leaf of the inputs the dimension that counts examples, None for what all examples share. None in its
    place: the inputs cannot be cut (a whole graph, one batch of a training loop), and are run as they are.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    labels: Tensor | None
    rows: int
    held_out: bool
    cut: tuple[int | None, ...] | None = None

    def take(self, start: int, stop: int) -> Probe:
        """Examples start..stop as a probe of their own; all of them where inputs cannot be cut."""
        if self.cut is None or (start, stop) == (0, self.rows):
            return self
        leaves, form = tree_flatten((self.args, dict(self.kwargs)))
        parts = [
            x if dim is None else x.narrow(dim, start, stop - start) for x, dim in zip(leaves, self.cut, strict=True)
        ]
        args, kwargs = tree_unflatten(parts, form)
        labels = None if self.labels is None else self.labels[start:stop]
        return replace(self, args=args, kwargs=kwargs, labels=labels, rows=stop - start)

    def pieces(self, chunk: int = CHUNK) -> list[Probe]:
        """Return the probe in pieces of at most `chunk` examples, in order."""
        if self.cut is None:
            return [self]
        return [self.take(start, min(start + chunk, self.rows)) for start in range(0, self.rows, chunk)]

    def counts(self, number: int) -> bool:
        """Whether so many rows of outputs can be one for each example, as far as the inputs' sizes say."""
        if number == self.rows or self.held_out:
            return number == self.rows
        return any(number in x.shape for x in _tensors((self.args, self.kwargs)))


def _tensors(call: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(call)[0] if isinstance(leaf, Tensor) and leaf.dim()]


def as_call(example: Any, what: str = "example input") -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Turn an example input (tensor, tuple of arguments or dict of keyword arguments) into (args, kwargs).

    Raises: ArgumentError: it is neither, or its tensors hold no example.
    """
    tensors = _tensors(example)
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
    return next((int(tensor.shape[0]) for tensor in _tensors(call)), 0)


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
    if labels is not None and (not isinstance(labels, Tensor) or labels.dim() != 1 or len(labels) == 0):
        raise ArgumentError("probe labels must be a tensor of one dimension: one class index per example.")
    if labels is not None:
        check_labels(labels, None)
        tensors = _tensors((args, kwargs))
        sizes = {size for x in tensors for size in x.shape[:2]}
        if len(labels) not in sizes and all(x.shape[0] == rows for x in tensors):
            raise ArgumentError(f"probe labels must be a tensor of shape ({rows},): one class index per example.")
    found = Probe(args=args, kwargs=kwargs, labels=labels, rows=rows, held_out=True)
    cuts = cuts_of(found)
    return cuts[0] if cuts else replace(found, rows=len(labels) if labels is not None else rows)


def cuts_of(probe: Probe) -> list[Probe]:
    """Return the probe with its first input's dimension 0 as the one that counts examples, and with dimension 1."""
    leaves, _ = tree_flatten((probe.args, dict(probe.kwargs)))
    first = _tensors(leaves)[0]
    found = []
    for axis in range(min(2, first.dim())):
        rows = int(first.shape[axis])
        if rows < 2 or (probe.labels is not None and len(probe.labels) != rows):
            continue
        cut = tuple(_dim_of(x, rows, axis if x is first else 0) for x in leaves)
        found.append(replace(probe, rows=rows, cut=cut))
    return found


def _dim_of(x: Any, rows: int, first: int) -> int | None:
    """Return the dimension of an input that counts examples: the one asked for, else the other of its first two."""
    if not isinstance(x, Tensor) or x.layout is not torch.strided:
        return None
    return next((dim for dim in (first, 1 - first) if dim < x.dim() and x.shape[dim] == rows), None)


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


def check_rows(out: Any, logits: Tensor | None, rows: int) -> None:
    """Raise ArgumentError unless what is read off the output has one row per example."""
    if logits is not None:
        found = [len(logits)]
    elif isinstance(out, list | tuple) and len(out) == rows:
        return
    else:
        held = read_output(out)
        found = [size for x in (*held.numbers.values(), *held.whole.values()) for size in x.shape[:2]]
    if found and rows not in found:
        raise ArgumentError(
            f"probe: {rows} rows of the inputs give outputs of {found[0]} rows. Examples must lie along one dimension "
            "of the inputs, and the outputs (or what logits= reads) must have one row for each."
        )


def like_example(call: Call, example: Call) -> Call:
    """Cast inputs to the floating dtypes of the example: under autocast a loop may pass others."""
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


def outputs(
    model: nn.Module,
    probe: Probe,
    *,
    chunk: int = CHUNK,
    passes: int = 0,
    training: bool = False,
    seed: int | None = None,
) -> list[Any]:
    """Return the model's outputs, in chunks of examples of a probe that can be cut; leaves no trace on the model.

    Args:
        model: what is run.
        probe: on what.
        chunk: most examples per pass.
        passes: how many are made at least, where other ranks, which gather parameters at the same time, make more.
        training: in training mode, dropout modules let everything through; else in evaluation mode.
        seed: of the global generators during the passes, which go on afterwards where they were; None: as they are.
    """
    found = []
    with internal_passes(model, training=training, seed=seed):
        for part in probe.pieces(chunk):
            args, kwargs = tree_map_only(Tensor, Tensor.clone, (part.args, dict(part.kwargs)))  # it may write to them
            found.append(_called(model, args, kwargs))
        for _ in range(len(found), passes):
            _called(model, args, kwargs)
    return found


def _called(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    try:
        return run_fitted(model, args, kwargs)
    except Exception as error:  # the user's forward may raise anything
        if is_out_of_memory(error):
            raise OutOfMemoryError(f"memory ran out in a forward pass on examples: {error}") from error
        raise


def comparable(outs: Sequence[Any], read: ReadLogits | None) -> bool:
    """Whether outputs hold floating-point numbers."""
    return any(x.numel() for out in outs for x in read_output(out, read).numbers.values())


def training_outputs(
    model: nn.Module, probe: Probe, read: ReadLogits | None, *, passes: int = 0, checked: bool = True
) -> list[Any] | None:
    """Return what training mode gives, where that can be compared with another pass of the same kind; else None.

    It cannot where the model does not run so on these inputs, returns no numbers, or draws them at random.

    Args: checked: run it twice, to see whether it draws them at random.
    """
    found: list[list[Any]] = []
    for seed in (0, 1) if checked else (0,):
        try:
            found.append(outputs(model, probe, passes=passes, training=True, seed=seed))
        except (OutOfMemoryError, RankError):
            raise
        except Exception:  # noqa: BLE001 - the user's forward may raise anything: it needs targets, say
            return None
    if not comparable(found[0], read):
        return None
    first, other = ([read_output(out, read) for out in outs] for outs in (found[0], found[-1]))
    try:
        apart = difference(first, other)
    except NonFiniteError:
        return None
    return found[0] if apart.moved <= 1e-8 * apart.spread and not apart.resized else None


def _leaves(out: Any) -> list[Tensor]:
    leaves = [x for x in tree_flatten(out)[0] if _is_plain(x)]
    if leaves:
        return leaves
    values = vars(out).values() if hasattr(out, "__dict__") else ()  # a plain object of tensors
    return [x for x in values if _is_plain(x)]


def _is_plain(x: Any) -> bool:
    if not isinstance(x, Tensor) or is_masked(x):
        return False
    return x.is_floating_point() and x.layout is torch.strided and not x.is_nested


def logits_of(out: Any, read: ReadLogits | None) -> Tensor | None:
    """(examples, classes) logits, or None where the output has none: one tensor of two dimensions with >= 2 columns."""
    if read is not None:
        return read_logits(out, read)
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
    training: tuple[list[Any], list[Any]] | None = None,
) -> Change:
    """How far the outputs moved between two passes over the same examples.

    Args:
        before: what `outputs` returned.
        after: the same after surgery.
        labels: (examples,) class indices, or None.
        read: as logits=.
        probe: what the passes were made on. Outputs without a row for each example then give no bound.
        training: the same two of training mode, which count where evaluation returns no numbers, or as many as it
            happens to find.

    Raises:
        NonFiniteError: the outputs before hold NaN or infinity (after: the change is infinite).
        ArgumentError: a held-out probe and outputs of other rows, or labels that name no class.
    """
    found = difference([read_output(out, read) for out in before], [read_output(out, read) for out in after])
    moved, spread, mode = found.moved, found.spread, "evaluation" if found.compared else ""
    if training is not None and (not found.compared or found.resized):
        other = difference(*([read_output(out, read) for out in outs] for outs in training))
        if other.compared:
            moved, spread, mode = other.moved, other.spread, "training"
    rows, flips, losses, close, readable = _compare_classes(before, after, labels, read, probe)
    return Change(
        moved=moved,
        spread=spread,
        mode=mode,
        rows=rows,
        flips=flips,
        losses=losses,
        margin_share=close / rows if readable and rows else 1.0,
        readable=readable and rows > 0,
        whole=found.whole,
        changed=found.changed / found.whole if found.whole else None,
        resized=found.resized,
    )


def _compare_classes(
    before: list[Any], after: list[Any], labels: Tensor | None, read: ReadLogits | None, probe: Probe | None
) -> tuple[int, int, int, int, bool]:
    """Return examples, flips, losses, examples at risk, and whether the outputs could be read as classes."""
    rows = flips = losses = close = 0
    readable = True
    sizes = None if probe is None else [piece.rows for piece in probe.pieces()]
    for i, (old, new) in enumerate(zip(before, after, strict=True)):
        a, b = logits_of(old, read), logits_of(new, read)
        size = num_rows(_leaves(old)) if a is None else len(a)
        readable = readable and a is not None and b is not None and a.shape == b.shape
        if probe is not None and sizes is not None:
            if probe.held_out and probe.cut is not None:
                for out, logits in ((old, a), (new, b)):
                    check_rows(out, logits, sizes[i])
            readable = readable and probe.counts(size) if probe.cut is None else readable and size == sizes[i]
            size = size if readable else sizes[i]
        if readable and a is not None and b is not None:
            truth = None if labels is None else labels[rows : rows + size]
            if truth is not None:
                check_labels(truth, a.shape[1])
            agreed = compare_logits(a, b, truth)
            flips, losses, close = flips + agreed.flips, losses + agreed.losses, close + agreed.at_risk
        rows += size
    return rows, flips, losses, close, readable


def as_probe(call: Call) -> Probe:
    """Return inputs of the user's as a probe that is run as it is, and gives no bound for a population."""
    return Probe(args=call[0], kwargs=call[1], labels=None, rows=max(1, num_rows(call)), held_out=False)
