"""What a model returns, read as numbers: nested containers, objects and plain Python values, and two passes compared.

Holds: walking what a forward pass returns, and how far two of them lie apart. Elsewhere: running a model
(evaluate), what a difference is allowed to be (decide.acceptance).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from apoptosis.errors import ArgumentError, NonFiniteError, one_line

ReadLogits = Callable[[Any], Tensor]
_BEYOND = 1e4  # times the largest value that changed
_NO_CONTAINERS = (Tensor, str, bytes, int, float, complex, bool, type, nn.Module, np.ndarray, np.generic)


@dataclass(frozen=True, slots=True, kw_only=True)
class Readings:
    """What one output holds, by its path: "", "[1]", "logits", "cache.layers[0].keys".

    numbers: floating-point values, float64; of complex ones real and imaginary parts along a last dimension. whole:
    integers and truth values (class indices, masks), of which can be said only whether they changed.
    """

    numbers: dict[str, Tensor] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How far two outputs lie apart.

    moved, spread: squared sums over everything that could be compared, the root of whose ratio is the relative rms.
    compared: how many tensors that was. whole, changed: integers and truth values, and how many of them changed.
    resized: paths of what has another size than before, or is there in one of the two alone.
    """

    moved: float = 0.0
    spread: float = 0.0
    compared: int = 0
    whole: int = 0
    changed: int = 0
    resized: tuple[str, ...] = ()


def parts(path: str, item: Any) -> list[tuple[str, Any]]:
    """Return what a container or object is made of, each part with its path."""
    if isinstance(item, Mapping):
        return [(join(path, key), value) for key, value in item.items()]
    if isinstance(item, (list, tuple, set, frozenset)):
        return [(f"{path}[{i}]", value) for i, value in enumerate(item)]
    if is_dataclass(item):
        return [(join(path, f.name), getattr(item, f.name, None)) for f in fields(item)]
    slots = [s for c in type(item).__mro__ for s in _names(vars(c).get("__slots__", ()))]
    found = {s: getattr(item, s, None) for s in slots if not s.startswith("__")} | dict(getattr(item, "__dict__", {}))
    return [(join(path, key), value) for key, value in found.items()]


def join(path: str, key: object) -> str:
    """Return the path of what a container holds under a key."""
    return f"{path}.{key}" if path else str(key)


def _names(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


def read(out: Any, logits: ReadLogits | None = None) -> Readings:
    """Read what a model returned. Plain Python numbers count where there is no tensor and no array of numbers.

    Args:
        out: the output.
        logits: as logits= of Apoptosis, for an output in which nothing else is found.

    Raises: ArgumentError: that function fails.

    Example:
        >>> read({"scores": [0.5, 0.25], "label": torch.tensor([3])}).numbers
        {'scores': tensor([0.5000, 0.2500], dtype=torch.float64)}
    """
    found, plain = Readings(), Readings()
    for path, item in _leaves(out):
        if isinstance(item, Tensor):
            _put(found, path, item)
        elif isinstance(item, np.ndarray | np.generic):
            if item.dtype.kind in "fciub":
                _put(found, path, torch.from_numpy(np.array(item)))
        elif (array := _array(item)) is not None:
            _put(plain, path, array)
    if not found.numbers:
        found = Readings(numbers=plain.numbers, whole=found.whole | plain.whole)
    if not found.numbers and logits is not None:
        _put(found, "logits", read_logits(out, logits))
    return found


def read_logits(out: Any, logits: ReadLogits) -> Tensor:
    """Return what the function given as logits= reads off an output.

    Raises: ArgumentError: it fails, or returns no tensor of (examples, classes >= 2).
    """
    try:
        found = logits(out)
    except Exception as error:  # the user's function may raise anything
        raise ArgumentError(
            f"logits=: the function fails on what the model returns ({kind_of(out)}): {one_line(error)}"
        ) from error
    if not isinstance(found, Tensor) or found.dim() != 2 or found.shape[1] < 2:
        raise ArgumentError("logits=: the function must return a tensor of shape (examples, classes >= 2).")
    return found


def kind_of(out: Any) -> str:
    """Say in a few words what a model returned."""
    if isinstance(out, Tensor):
        return f"a tensor of {str(out.dtype).removeprefix('torch.')}"
    if isinstance(out, list | tuple) and out:
        return f"a {type(out).__name__} of {type(out[0]).__name__}"
    return f"a {type(out).__name__}"


def _leaves(out: Any) -> Iterator[tuple[str, Any]]:
    """Yield what is no container, and lists of nothing but numbers as one."""
    seen: set[int] = set()
    todo = [("", out)]
    while todo:
        path, item = todo.pop()
        if isinstance(item, _NO_CONTAINERS) or _is_array(item):
            yield path, item
        elif item is not None and not isinstance(item, Iterator) and not callable(item) and id(item) not in seen:
            seen.add(id(item))
            todo.extend(reversed(parts(path, item)))


def _is_array(item: Any) -> bool:
    return isinstance(item, list | tuple) and _array(item) is not None


def _array(item: Any) -> Tensor | None:
    """Return a number, or nested lists of numbers of one shape, as a tensor."""
    first = item
    while isinstance(first, list | tuple) and first:
        first = first[0]
    if not isinstance(first, int | float | complex):
        return None
    try:
        array = np.asarray(item)
    except (ValueError, TypeError, RuntimeError):  # of several lengths, or with something else among them
        return None
    return torch.from_numpy(array.copy()) if array.dtype.kind in "fciub" else None


def _put(found: Readings, path: str, tensor: Tensor) -> None:
    x = tensor.detach()
    if is_masked(x):
        x = x.to_tensor(0.0)  # type: ignore[attr-defined]  # a MaskedTensor
    if x.is_quantized:
        x = x.dequantize()
    if x.is_nested:
        for i, part in enumerate(x.unbind()):
            _put(found, f"{path}[{i}]", part)
        return
    x = x.to_dense() if x.layout is not torch.strided else x
    if x.is_complex():
        found.numbers[path] = torch.view_as_real(x.resolve_conj()).double()
    elif x.is_floating_point():
        found.numbers[path] = x.double()
    else:
        found.whole[path] = x


def is_masked(tensor: Tensor) -> bool:
    """Whether it is a torch.masked.MaskedTensor, for which few operators exist."""
    return type(tensor).__name__ == "MaskedTensor"


def difference(before: Sequence[Readings], after: Sequence[Readings]) -> Difference:
    """Compare two passes, piece by piece; what has not the same size in both is left out and named.

    Raises: NonFiniteError: the outputs before hold NaN or infinity.
    """
    moved = spread = 0.0
    compared = whole = changed = 0
    resized: dict[str, None] = {}
    for old, new in zip(before, after, strict=True):
        for path, x in old.numbers.items():
            y = new.numbers.get(path)
            y = None if y is None or y.shape != x.shape else y.to(x.device)
            masked = torch.zeros_like(x, dtype=torch.bool) if y is None else _masked(x, y)
            if not bool((torch.isfinite(x) | masked).all()):
                raise NonFiniteError("the network's outputs on the probe hold NaN or infinity before any change.")
            if y is None:
                resized[path] = None
            elif x.numel():
                compared += 1
                moved += float((y - x).masked_fill(masked, 0.0).square().sum())
                spread += _spread(x, ~masked, whole=len(before) == 1)
        for path, a in old.whole.items():
            b = new.whole.get(path)
            if b is None or b.shape != a.shape:
                resized[path] = None
            else:
                whole += a.numel()
                changed += int((a != b.to(a.device)).sum())
        resized |= dict.fromkeys(path for path in (*new.numbers, *new.whole) if path not in old.numbers | old.whole)
    return Difference(
        moved=moved, spread=spread, compared=compared, whole=whole, changed=changed, resized=tuple(resized)
    )


def _masked(x: Tensor, y: Tensor) -> Tensor:
    """Return which values say "none": the same in both, and infinite or far beyond all that changed.

    Of masked scores (-inf, -1e9, the smallest number there is) the spread would hide what became of the others.
    """
    same = x == y
    changed = torch.maximum(x.abs(), y.abs())[~same]
    most = float(changed.nan_to_num(posinf=float("inf")).max()) if changed.numel() else float("inf")
    return same & (torch.isinf(x) | (x.abs() > _BEYOND * most))


def _spread(x: Tensor, counts: Tensor, *, whole: bool) -> float:
    """Return the squared sum around the mean of the rows; one number, or one example alone, counts by its size.

    counts: which values count.
    """
    x = x.masked_fill(~counts, 0.0)
    if x.dim() == 0 or (whole and x.shape[0] == 1):
        return float(x.square().sum())
    mean = x.sum(0, keepdim=True) / counts.sum(0, keepdim=True).clamp(min=1)
    return float((x - mean).masked_fill(~counts, 0.0).square().sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """How far the outputs moved.

    flips: examples whose largest output changed. losses: right before and wrong after (equal to flips where labels are
    missing). margin_share: share of examples whose two largest logits differ by at most twice the largest change of a
    logit. readable: whether the outputs have columns to compare, one row per example. moved, spread: squared sums, the
    root of whose ratio is `rms`. mode: whose outputs these are, "evaluation" or "training"; "" where there was nothing
    to compare, and rms says nothing. changed: share of integers and truth values among the outputs that changed, None
    without any. resized: paths of outputs whose size changed.
    """

    rows: int
    flips: int
    losses: int
    margin_share: float
    readable: bool
    moved: float
    spread: float
    mode: str = "evaluation"
    whole: int = 0
    changed: float | None = None
    resized: tuple[str, ...] = ()

    @property
    def rms(self) -> float:
        """Root mean square of the change, relative to the centred output."""
        return root_of(self.moved, self.spread)


def together(changes: Sequence[Change]) -> Change:
    """Return what changed on several sets of examples as one."""
    if len(changes) == 1:
        return changes[0]
    rows, whole = sum(change.rows for change in changes), sum(change.whole for change in changes)
    modes = {change.mode for change in changes} - {""}  # one alone counts: the ratios of two have nothing in common
    mode = "evaluation" if "evaluation" in modes else next(iter(modes), "")
    of_mode = [change for change in changes if change.mode == mode]
    moved, spread = sum(change.moved for change in of_mode), sum(change.spread for change in of_mode)
    return Change(
        moved=moved,
        spread=spread,
        mode=mode,
        rows=rows,
        flips=sum(change.flips for change in changes),
        losses=sum(change.losses for change in changes),
        margin_share=sum(change.margin_share * change.rows for change in changes) / max(rows, 1),
        readable=all(change.readable for change in changes),
        whole=whole,
        changed=sum(change.whole * (change.changed or 0.0) for change in changes) / whole if whole else None,
        resized=tuple(dict.fromkeys(path for change in changes for path in change.resized)),
    )


def root_of(moved: float, spread: float) -> float:
    """Return the root of their ratio; infinite where something moved that had no spread, or moved without bound."""
    if not moved < float("inf"):
        return float("inf")
    return (moved / spread) ** 0.5 if spread > 0 else (0.0 if moved == 0 else float("inf"))
