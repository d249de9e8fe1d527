"""The plain numbers of a running pass, and which values are multiples of them.

Holds: the record of numbers call by call, and following them: a number that scales the channels of a product of
activations, or its sums, is distinguished from one that does anything else. Elsewhere: what a changed number means
(factors.py), which numbers count (scalars.py).

A literal is a tensor of nothing but numbers (`torch.full([], d**0.5)`). Of channels it is followed as long as they
scale with the weights that make them, of sums as long as they are multiplied and divided alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor, dtype, nn
from torch.nn.modules.dropout import _DropoutNd

from apoptosis.graph.trace.result import TraceResult
from apoptosis.graph.trace.scalars import literal
from apoptosis.graph.trace.values import CHANNELS, LITERAL, Multiple, Value
from apoptosis.model.module_state import storage_of
from apoptosis.records import ScalarOperands

if TYPE_CHECKING:
    from apoptosis.graph.trace.tracer import Call


class Numbers:
    """Notes the plain numbers of one pass and what they scale. `recorded` says what is known of a tensor."""

    def __init__(self, trace: TraceResult, mode: str, recorded: Callable[[Tensor], Value | None]) -> None:
        self._noted = trace.scalars[mode]
        self._reads = trace.multiples[mode]
        self._recorded = recorded
        self._at = -1

    def note(self, call: Call, out: Any) -> int:
        """Note the plain numbers that this call used; return the place of the note, -1 where there is none."""
        self._at = self._note(call, out)
        return self._at

    def _note(self, call: Call, out: Any) -> int:
        """Note all numbers but those of dropout, whose rate may be scheduled."""
        values = call.operator.numbers(call, out) if call.operator.numbers is not None else ()
        if not values or isinstance(call.tracer.module, (_DropoutNd, nn.MultiheadAttention)):
            return -1  # the head size that torch's attention divides by is kept by the surgery on it
        known = self._recorded(call.args[0]) if call.args and isinstance(call.args[0], Tensor) else None
        if known is not None and known.keep is not None:
            return -1
        self._noted.append(
            ScalarOperands(
                operator=call.label, values=values, module=call.tracer.module_name, where=call.tracer.where()
            )
        )
        return len(self._noted) - 1

    @property
    def at(self) -> int:
        """Place of the note of the call that runs, -1 where there is none."""
        return self._at

    def read(self, multiple: Multiple) -> None:
        """Note that something else than a factor reads a multiple."""
        self._reads[multiple] = None

    def read_all(self, tensor: Tensor) -> None:
        """Note that something reads what a tensor is known to be a multiple of."""
        if (found := self._of(tensor)) is not None:
            self.read(found)

    def of_channels(self, value: Value) -> tuple[tuple[int, int, float], ...]:
        """Return the numbers in an operand of a product of activations."""
        if value.multiple is not None and value.multiple.of != CHANNELS:
            self.read(value.multiple)
            return ()
        return value.multiple.numbers if value.multiple is not None else ()

    def fused(self, call: Call, multiple: Multiple | None, others: Iterable[object]) -> None:
        """Note that an operator makes scores, scales and reads them by itself, and reads the other operands."""
        if multiple is not None:
            scale = ((self._at, 0, 1.0),) if self._at >= 0 else ()
            self.read(Multiple(multiple.of, tuple(sorted((*multiple.numbers, *scale)))))
        for operand in others:
            if isinstance(operand, Tensor):
                self.read_all(operand)

    def follow(self, call: Call, at: int, result: Value | None) -> Multiple | None:
        """Say what the result of a call is a multiple of; what goes on in no result is read here.

        at: the place of the note of the call. result: what its rule says.
        """
        known = [self._of(tensor) for tensor in call.tensors()]
        held = [multiple for multiple in known if multiple is not None]
        own = result.multiple if result is not None else None
        role = call.operator.role
        if own is not None and (role == "contracts" or (role == "sums" and all(own is not m for m in held))):
            made: Multiple | None = own
            held = []  # the rule took what its operands are multiples of
        elif role == "attends":
            return None
        elif role in ("multiplies", "divides"):
            made = self._scaled(call, at, result)
        elif not held:
            single = at >= 0 and (call.operator.numbers is not literal or len(self._noted[at].values) == 1)
            made = Multiple(LITERAL, ((at, 0, 1.0),)) if single and call.operator.fills else None
        else:
            made = _carried(call, known, held, result)
        target = call.args[0] if call.inplace and call.args else None
        if isinstance(target, Tensor) and not _whole(target):
            held, made = [*held, *([made] if made is not None else [])], None
        if made is None:
            for multiple in held:
                self.read(multiple)
        return made

    def _of(self, tensor: Tensor) -> Multiple | None:
        value = self._recorded(tensor)
        return None if value is None else value.multiple

    def _scaled(self, call: Call, at: int, result: Value | None) -> Multiple | None:
        """One operand of a product or quotient of elements may be channels or sums; the others are its factors."""
        if call.kwargs.get("rounding_mode") is not None:
            return None
        found: list[tuple[int, int, float]] = []
        of, others = "", False
        for i, operand in enumerate(call.args[:2]):
            power = -1.0 if call.operator.role == "divides" and i == 1 else 1.0
            if not isinstance(operand, Tensor):
                found += [(at, 0, power)] if at >= 0 else []
                continue
            value = self._recorded(operand)
            multiple = value.multiple if value is not None else None
            if multiple is None and value is not None and value.linear:
                multiple = Multiple(CHANNELS, ())
            if multiple is None:
                others = True
                continue
            if multiple.of != LITERAL:
                if of or power < 0.0:
                    return None
                of = multiple.of
            found += [(call_at, place, own * power) for call_at, place, own in multiple.numbers]
        if not of:
            return Multiple(LITERAL, tuple(sorted(found))) if found and not others else None
        if of == CHANNELS and (not found or result is None or not result.linear):
            return None
        return Multiple(of, tuple(sorted(found)))


def _carried(call: Call, known: list[Multiple | None], held: list[Multiple], result: Value | None) -> Multiple | None:
    """Return what goes on through one operator that is no product."""
    first, operator = held[0], call.operator
    if operator.role == "moves" and len(known) == 1:
        return first if len(call.args) < 2 or not isinstance(call.args[1], dtype) else None
    if first.of == LITERAL and len(known) == 1:
        power = operator.power if operator.power is not None or len(call.args) < 2 else call.args[1]
        if operator.role != "powers" or not isinstance(power, int | float):
            return None
        return Multiple(LITERAL, tuple((i, j, p * float(power)) for i, j, p in first.numbers))
    alike = first.of == CHANNELS and all(multiple == first for multiple in known)
    return first if alike and operator.role == "adds" and result is not None and result.linear else None


def _whole(tensor: Tensor) -> bool:
    """Whether a tensor is all there is of its memory."""
    storage = storage_of(tensor)
    return storage is not None and tensor.numel() * tensor.element_size() == storage.nbytes()
