"""The plain numbers that a model's arithmetic uses, and whether an edit changed one.

Holds: which numbers of an operator call count, and the comparison of two passes. Elsewhere: channels.

A number that the model computes from a width (`h / h.shape[1] ** 0.5`) changes with the edit while every column still
meets its channel; only the numbers themselves show it. Sizes, dims and indices change rightly and are no such numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.batchnorm import _BatchNorm

from apoptosis.errors import StructureChangedError
from apoptosis.graph.explain import place_of
from apoptosis.records import ScalarOperands

if TYPE_CHECKING:
    from apoptosis.graph.trace.tracer import Call

ITEM = "_local_scalar_dense"
"""What `tensor.item()` calls: a number that depends on the data."""

_NUMBERS = (int, float, complex)
_SMALL = 16  # a literal tensor of at most so many numbers is compared number by number


def operands(call: Call, out: Any) -> tuple[complex, ...]:
    """Return the plain numbers among the operands of one call, in order; those inside lists are sizes."""
    return _plain((*call.args, *(call.kwargs[k] for k in sorted(call.kwargs))))


def scale_argument(call: Call, out: Any) -> tuple[complex, ...]:
    """Return the one number of fused attention, if it is given."""
    return _plain((call.kwargs.get("scale"),))


def item(call: Call, out: Any) -> tuple[complex, ...]:
    """Return the number that was read off a tensor, but for a counter of batches."""
    return () if isinstance(call.tracer.module, _BatchNorm) else (out,)


def _plain(arguments: Iterable[Any]) -> tuple[complex, ...]:
    return tuple(a for a in arguments if isinstance(a, _NUMBERS))


def literal(call: Call, out: Any) -> tuple[complex, ...]:
    """Return the numbers of a tensor that the model wrote out; () for several whole numbers, which are positions."""
    tensor = call.outs[0]
    if tensor.is_meta or isinstance(tensor, FakeTensor):  # there are none
        return ()
    if tensor.numel() > (_SMALL if tensor.is_floating_point() or tensor.is_complex() else 1):
        return ()
    return tuple(tensor.detach().reshape(-1).tolist())


def _same(a: tuple[complex, ...], b: tuple[complex, ...]) -> bool:
    return len(a) == len(b) and all(x == y or (x != x and y != y) for x, y in zip(a, b, strict=True))


def changed_numbers(old: Sequence[ScalarOperands], new: Sequence[ScalarOperands]) -> frozenset[int]:
    """Return the calls that use other numbers in the other pass, up to where the passes part or read data."""
    found: set[int] = set()
    for at, (a, b) in enumerate(zip(old, new, strict=False)):
        if a.operator != b.operator:
            break
        if not _same(a.values, b.values):
            if a.operator.endswith(ITEM):
                break
            found.add(at)
    return frozenset(found)


def changed_scalar(
    old: Sequence[ScalarOperands],
    new: Sequence[ScalarOperands],
    exempt: Set[int] = frozenset(),
    why: Mapping[int, str] = MappingProxyType({}),
) -> StructureChangedError | None:
    """Return an error that says which number of one pass is another one in the other pass, or None.

    A number read from data (`tensor.item()`) moves with any edit, and what comes after it may follow from it: the
    comparison ends there. exempt: calls whose numbers may change; why: what is known of those of others.
    """
    for at, (a, b) in enumerate(zip(old, new, strict=False)):
        if a.operator != b.operator:
            return _changed(f"{_call(b)} runs where {_call(a).removeprefix('operator ')} ran before the edit", b, a)
        if not _same(a.values, b.values):
            if a.operator.endswith(ITEM):
                return None
            if at in exempt:
                continue
            before, after = (", ".join(f"{v:.6g}" for v in s.values) or "none" for s in (a, b))
            known = f", {why[at]} (a scale that is an attribute, set once, would stay)" if at in why else ""
            return _changed(f"{_call(b)} uses the number {after}, which was {before} before the edit{known}", b)
    if len(old) != len(new):
        extra = (old if len(old) > len(new) else new)[min(len(old), len(new))]
        ran = "no longer runs" if len(old) > len(new) else "runs only"
        return _changed(f"{_call(extra)} {ran} after the edit", extra)
    return None


def _changed(text: str, *calls: ScalarOperands) -> StructureChangedError:
    places = tuple(call.where for call in calls)
    return StructureChangedError(f"{text}: the model computes with sizes.", module=calls[0].module, places=places)


def _call(call: ScalarOperands) -> str:
    return f"operator {call.operator}{place_of(call.module, call.where)}"
