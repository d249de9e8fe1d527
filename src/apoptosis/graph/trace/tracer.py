"""The Tracer: which channels every tensor of the running pass carries.

Holds: the stack of running modules, who reads what, reasons with the user's line, and handing each executed
operator to its rule. Elsewhere: the rules; the record of values (trace/storage.py).
"""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from apoptosis.graph.explain import Code, Reason, parametrized, place_of, reason_of
from apoptosis.graph.trace.activations import RunningNeuron, on_enter
from apoptosis.graph.trace.calls import Calls
from apoptosis.graph.trace.ids import TensorInfo, View
from apoptosis.graph.trace.multiples import Numbers
from apoptosis.graph.trace.operators import UNKNOWN, Operator, Result
from apoptosis.graph.trace.result import TraceResult
from apoptosis.graph.trace.storage import Entries, Mark, Outputs, Pad, StorageMap
from apoptosis.graph.trace.values import Origin, TooLargeError, Value, nothing
from apoptosis.records import IntArray, Seen

FRAME_MARKS: set[CodeType] = set()
"""Code objects that call the user's model: frames outside of them are no lines of the model."""

_TORCH = os.path.dirname(torch.__file__)
_HERE = os.path.dirname(os.path.dirname(__file__))  # all of graph


@dataclass(slots=True)
class Call:
    """One executed operator, as a rule sees it.

    name: without namespace and trailing underscore. outs: its tensors. operator: its row of the table.
    """

    tracer: Tracer
    name: str
    label: str
    overload: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outs: list[Tensor]
    inplace: bool = False
    operator: Operator = UNKNOWN

    @property
    def trace(self) -> TraceResult:
        """What the captures of the model have found so far."""
        return self.tracer.trace

    def value(self, tensor: Tensor) -> Value:
        """Return what is known of an operand."""
        return self.tracer.value(tensor)

    def view(self, tensor: Tensor) -> View | None:
        """Return which part of which parameter or buffer an operand is, or None."""
        return self.tracer.memory.view(tensor)

    def tie(self, one: IntArray, other: IntArray) -> None:
        """Record that the channels at the same places, after broadcasting, are removed together."""
        self.tracer.trace.tie(one, other)

    def arg(self, index: int, key: str, default: Any = None) -> Any:
        """Return an argument, given by position or by name."""
        return self.args[index] if index < len(self.args) else self.kwargs.get(key, default)

    def tensors(self) -> list[Tensor]:
        """Return every tensor among the arguments, those in lists included."""
        return _flatten((*self.args, *self.kwargs.values()))

    def reason(self, why: Code | Reason | str, remedy: str = "") -> Reason:
        """Complete a reason: the operator, the module it runs in and the user's line."""
        return self.tracer.reason(why, remedy, self.label)

    def pin(self, ids: IntArray, why: Code | Reason | str, remedy: str = "", *, inner: bool = False) -> None:
        """Pin the channels of these ids. inner: but not the whole heads that they are in."""
        if bool((ids != 0).any()):
            self.tracer.trace.pin(ids, self.reason(why, remedy), inner=inner)

    def pin_parameter(self, info: TensorInfo, why: Code | Reason | str, remedy: str = "") -> None:
        """Pin every position of a parameter, and list it as a group of its own unless it has one."""
        self.pin(info.ids(), why, remedy)
        if len(info.shape) > 1 and not info.is_buffer:
            self.tracer.trace.listed.setdefault((info.name, 0), info.name)

    def pin_all(self, why: Code | Reason | str, remedy: str = "") -> None:
        """Pin everything that reaches the operator; its results carry no channels."""
        for tensor in self.tensors():
            if (view := self.view(tensor)) is not None:
                self.pin_parameter(view.info, why, remedy)
            else:
                self.pin(self.value(tensor).ids, why, remedy)

    def origin(self) -> Origin:
        """Return what results without channels are."""
        return Origin(f"the result of {self.label}", literal=self.operator.literal)


@dataclass(slots=True)
class _Kind:
    """An overload.

    writes: places of the arguments that it writes to. reshapes: it changes a tensor object's shape. computes: its
    outputs are no views of its inputs.
    """

    name: str
    label: str
    overload: str
    operator: Operator
    writes: tuple[int, ...] = ()
    reshapes: bool = False
    computes: bool = False


def _flatten(items: Iterable[Any]) -> list[Tensor]:
    out: list[Tensor] = []
    for item in items:
        if isinstance(item, Tensor):
            out.append(item)
        elif isinstance(item, (list, tuple)):
            out.extend(_flatten(item))
    return out


class Tracer:
    """Follows one forward pass of `model` in one mode and writes what the rules find into `trace`."""

    def __init__(
        self,
        trace: TraceResult,
        model: nn.Module,
        tensors: Mapping[str, Tensor],
        inputs: Iterable[Tensor],
        operators: Mapping[str, Operator],
        mode: str,
        watch: Callable[[Seen], None] | None = None,
        note: Callable[[Call], None] | None = None,
    ) -> None:
        self.trace = trace
        self.mode = mode
        self._operators = operators
        self._watch, self._note = watch, note
        self._fake = any(isinstance(tensor, FakeTensor) for tensor in tensors.values())
        self.suspended = False
        self._kinds: dict[Any, _Kind] = {}
        self._names = {id(module): name for name, module in model.named_modules()}
        self._stack: list[tuple[str, nn.Module, RunningNeuron | None, Mark | None]] = []
        self._label = ""
        given = list(inputs)
        here = weakref.proxy(self)  # so that the tensors of this pass go with it, not when Python looks for cycles
        self.memory = StorageMap(trace.channel_ids, tensors, given, lambda ids, why: here._pin(ids, why))
        self.entries, self.outputs = Entries(self.memory), Outputs(self.memory)
        self.calls = None if watch is not None else Calls(trace.log, self.memory, given, self._names, mode)
        self.numbers = Numbers(trace, mode, self.memory.recorded)

    # -- tensors ------------------------------------------------------------------------------------------------

    def view(self, tensor: Tensor) -> View | None:
        """Return which part of which parameter or buffer this tensor is, or None."""
        return self.memory.view(tensor)

    def value(self, tensor: Tensor) -> Value:
        """Return what is known of an operand; a parameter along one axis of which it runs gives that axis' ids."""
        return self.memory.value(tensor) if (view := self.memory.view(tensor)) is None else self._as_value(view)

    def _as_value(self, view: View) -> Value:
        varied = view.varied()
        self.read(view.info, "operator")
        if view.dims is not None and len(varied) == 1:
            return Value(view.ids(varied[0]), origin=Origin(f"'{view.info.name}'"))
        if view.dims is None or varied:
            self._pin(view.info.ids(), Code.REARRANGED(name=view.info.name))
        return nothing(view.ndim, Origin(f"'{view.info.name}'"))

    def reason(self, why: Code | Reason | str, remedy: str, label: str) -> Reason:
        """Complete a reason: the operator, the module it runs in, the user's line, what takes a parametrization off."""
        found = reason_of(why, self.take_off() or remedy)
        operator = f"operator {label}{place_of(self.module_name)} " if label else ""
        return replace(found, text=operator + found.text, where=self.where(), operator=label)

    def _pin(self, ids: IntArray, why: Code | Reason) -> None:
        if bool((ids != 0).any()):
            self.trace.pin(ids, self.reason(why, "", self._label))

    def show(self, site: str, make: Callable[[], tuple[Tensor, Tensor | None]]) -> None:
        """Hand what a site reads to the function that watches this pass."""
        if self._watch is not None:
            x, right = make()
            self._watch(Seen(site=site, x=x, right=right))

    # -- modules ------------------------------------------------------------------------------------------------

    @property
    def module_name(self) -> str:
        """Qualified name of the innermost running module."""
        return self._stack[-1][0] if self._stack else ""

    @property
    def running(self) -> tuple[str, ...]:
        """Qualified names of all running modules, the innermost first."""
        return tuple(name for name, *_ in reversed(self._stack)) or ("",)

    @property
    def watched(self) -> bool:
        """Whether this pass is only run to show what sites read."""
        return self._watch is not None

    @property
    def module(self) -> nn.Module | None:
        """The innermost running module."""
        return self._stack[-1][1] if self._stack else None

    def entered(self, module: nn.Module, args: Any) -> None:
        """Note that a module's forward begins."""
        if not self.suspended:
            name = self._names.get(id(module), type(module).__name__)
            entry = self.entries.mark(args[0]) if isinstance(args, tuple) and args else None
            self._stack.append((name, module, on_enter(self, module, args), entry))

    def left(self, module: nn.Module, output: Any) -> None:
        """Note that a module's forward ended."""
        if self.suspended or not self._stack:
            return
        name, _, neuron, _ = self._stack.pop()
        if not self.watched:
            self.trace.calls[name, self.mode] += 1
            self.outputs.made(name, output)
        if neuron is not None and isinstance(output, Tensor) and self.view(output) is None:
            self.memory.put(output, neuron.on_exit(self, output))

    def pads_from_input(self, tensor: Tensor) -> tuple[Pad, ...] | None:
        """Return what pads the innermost module's first argument into this tensor; None where it is another."""
        return self.entries.pads_from(self._stack[-1][3] if self._stack else None, tensor)

    def info_of(self, module: nn.Module, leaf: str) -> TensorInfo | None:
        """Return the raw parameter or buffer that `module.leaf` is, or None (absent, or computed)."""
        tensor = getattr(module, leaf, None)
        view = self.view(tensor) if isinstance(tensor, Tensor) else None
        return view.info if view is not None and view.whole else None

    def read(self, info: TensorInfo, reader: str) -> None:
        """Note who reads a parameter or buffer: its own module, or some operator."""
        self.trace.read_counts[info.name, self.mode] += 1
        module = self.module
        if module is not None and any(t is not None and self.memory.same(t, info) for t in self._direct(module)):
            reader = self.module_name
        if reader not in self.trace.reads[info.name]:
            self.trace.reads[info.name].add(reader)

    @staticmethod
    def _direct(module: nn.Module) -> Iterable[Tensor | None]:
        return (*module._parameters.values(), *module._buffers.values())

    def where(self) -> str:
        """Return the line of the user's model that is running, "" where only library modules are."""
        frame = sys._getframe(1)
        while frame is not None and not any(frame.f_code is mark for mark in FRAME_MARKS):  # hashes of code are slow
            path = frame.f_code.co_filename
            if not path.startswith((_TORCH, _HERE, "<")):
                return f"{os.path.basename(path)}:{frame.f_lineno}"
            if frame.f_back is None:
                break
            frame = frame.f_back
        return ""

    def take_off(self) -> str:
        """Return how to take off what computes a weight of the running modules, "" where nothing does."""
        return parametrized((name, module) for name, module, *_ in reversed(self._stack))

    # -- operators ----------------------------------------------------------------------------------------------

    def _kind(self, func: Any) -> _Kind:
        kind = self._kinds.get(func)
        if kind is None:
            full = func._schema.name
            space, _, name = full.partition("::")
            writes = tuple(
                i for i, a in enumerate(func._schema.arguments) if a.alias_info is not None and a.alias_info.is_write
            )
            inplace = writes[:1] == (0,) and name.endswith("_")
            base = name[:-1] if inplace else name
            operator = self._operators.get(base, UNKNOWN) if space == "aten" else UNKNOWN
            reshapes = inplace and operator.reshapes
            if reshapes or (operator.writes_beside and not inplace):
                writes = ()
            if writes and not inplace:  # to a tensor that is given for the result
                operator = replace(operator, rule=None, reads=True)
            views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
            computes = not views and not reshapes
            kind = _Kind(base, f"{space}.{name}", func._overloadname, operator, writes, reshapes, computes)
            self._kinds[func] = kind
        return kind

    def before(self, func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the arguments as they will be wanted after the operator has run.

        Of an operator that changes the shape of the tensor object itself, a second object for the same memory is kept.
        """
        if self._kind(func).reshapes and isinstance(args[0], Tensor):
            return (args[0].detach(), *args[1:])
        return args

    def executed(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> None:
        """Send the ids through one operator that has just run."""
        if not self.suspended:
            self._execute(self._kind(func), args, kwargs, out)

    def composite(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> None:
        """Send the ids through a function of torch that is followed as one operator."""
        self._execute(_Kind(name, f"aten.{name}", "default", self._operators[name]), args, kwargs, out)

    def _execute(self, kind: _Kind, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> None:
        with unset_fake_temporarily() if self._fake else nullcontext():  # what is computed here holds numbers
            self._follow(kind, args, kwargs, out)

    def _follow(self, kind: _Kind, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> None:
        self._label = kind.label
        outs, operator = _flatten((out,)), kind.operator
        call = Call(self, kind.name, kind.label, kind.overload, args, kwargs, outs, bool(kind.writes), operator)
        if operator.reads:
            self._note_reads(call)
        at = self.numbers.note(call, out)
        if self._note is not None and operator.picks:
            self._note(call)
        result: Result = None
        macs = self.trace.macs[self.mode]
        try:
            if operator.rule is not None:
                result = operator.rule(call)
            else:
                call.pin_all(Code.NO_RULE)
        except TooLargeError:
            call.pin_all(Code.TOO_LARGE)
        except (LookupError, TypeError, ValueError):  # called in a way that its rule does not know
            call.pin_all(Code.NOT_FOLLOWED)
        if self.calls is not None:
            self.calls.operator(kind.name, call.tensors(), outs, bool(kind.writes), lambda: self.running)
        values = [result] * len(outs[:1]) if isinstance(result, Value) else list(result or ())
        values += [None] * (len(outs) - len(values))
        multiple = self.numbers.follow(call, at, values[0] if values else None)
        made = [value or nothing(t.dim(), call.origin()) for t, value in zip(outs, values, strict=False)]
        made = [v if v.multiple is multiple else replace(v, multiple=multiple) for v in made]
        if kind.computes and macs == self.trace.macs[self.mode]:  # else a contraction, counted as such
            counted = zip(outs, made, strict=False)
            self.trace.elements += [(v.ids.reshape(-1), self.mode, float(t.numel())) for t, v in counted]
        if kind.writes:
            self._written(call, kind, made)
            return
        for tensor, value in zip(outs, made, strict=False):
            self.memory.put(tensor, value)

    def _written(self, call: Call, kind: _Kind, values: Sequence[Value]) -> None:
        targets = [call.args[i] for i in kind.writes if i < len(call.args) and isinstance(call.args[i], Tensor)]
        targets += [t for t in _flatten(call.kwargs.values()) if any(t is o for o in call.outs)]
        for i, tensor in enumerate(targets):
            value = values[i] if i < len(values) else nothing(tensor.dim(), call.origin())
            self.memory.write(tensor, value)
        for tensor in call.outs:
            if not any(self.memory.shared(tensor, target) for target in targets):
                self.memory.put(tensor, nothing(tensor.dim(), call.origin()))

    def _note_reads(self, call: Call) -> None:
        reader = f"@{self.module_name}" if call.operator.folds else "operator"
        for tensor in call.tensors():
            if (view := self.view(tensor)) is not None:
                self.read(view.info, reader)
                continue
            value = self.memory.recorded(tensor)
            if value is not None and value.source is not None:
                self.trace.readers[value.source].add("operator")

    def finished(self, outputs: Sequence[tuple[str, Tensor]]) -> None:
        """Pin what the model returns: tensors, each with its path inside the output."""
        if self.calls is not None:
            self.calls.finished(tensor for _, tensor in outputs)
        for path, tensor in outputs:
            self.numbers.read_all(tensor)
            which = f" '{path}'" if path else ""
            view = self.view(tensor)
            if view is not None:
                self.trace.pin(view.info.ids(), Code.RETURNED_PARAMETER(which=which and f" as{which}"))
                continue
            value = self.value(tensor)
            self.trace.pin(value.ids, Code.OUTPUT(which=which))
            if value.has_channels:
                self.trace.output_producers[len(self.trace.pins) - 1] = frozenset(value.paths)
            if value.source is not None:
                self.trace.readers[value.source].add("output")
