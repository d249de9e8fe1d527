"""The Tracer: which channels every tensor of the running pass carries.

Lives here: finding a tensor's value or parameter, in-place writes, the stack of running modules, reasons with the
user's line, and handing each executed operator to its rule. Does not live here: the rules.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import CodeType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from apoptosis.graph.findings import Findings, Reason
from apoptosis.graph.slots import Owner, View
from apoptosis.graph.values import SIZE_LIMIT, TooLargeError, Value, collapse, nothing, spoiled
from apoptosis.records import IntArray

FRAME_MARKS: set[CodeType] = set()
"""Code objects that call the user's model: beyond them lies no line of the model."""

_TORCH = os.path.dirname(torch.__file__)
_HERE = os.path.dirname(__file__)
_COMPOSITE: dict[type[nn.Module], str] = {nn.Softsign: "softsign", nn.Tanhshrink: "tanhshrink"}

# Operators that write to a buffer of the module or to noise beside their result.
_SIDE_WRITES = frozenset(("_native_batch_norm_legit", "_batch_norm_with_update", "rrelu_with_noise"))
# Operators that change a tensor object's shape and not its memory.
_IN_PLACE_SHAPES = frozenset(("t_", "transpose_", "squeeze_", "unsqueeze_", "swapaxes_", "swapdims_", "as_strided_"))

Result = Value | Sequence[Value | None] | None
Geometry = tuple[int, tuple[int, ...], tuple[int, ...]]


@dataclass(slots=True)
class Call:
    """One executed operator, as a rule sees it. name: without namespace and trailing underscore; outs: its tensors."""

    tracer: Tracer
    name: str
    label: str
    overload: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outs: list[Tensor]
    inplace: bool = False

    def arg(self, index: int, key: str, default: Any = None) -> Any:
        """Return an argument, given by position or by name."""
        return self.args[index] if index < len(self.args) else self.kwargs.get(key, default)

    def tensors(self) -> list[Tensor]:
        """Return every tensor among the arguments, those in lists included."""
        return _flatten((*self.args, *self.kwargs.values()))

    def reason(self, text: str, remedy: str = "") -> Reason:
        """Word a reason: the operator, the module it runs in and the user's line."""
        module = self.tracer.module_name
        place = f" in '{module}'" if module else ""
        return Reason(f"operator {self.label}{place} {text}", self.tracer.where(), remedy)

    def pin(self, slots: IntArray, text: str, remedy: str = "") -> None:
        """Pin the channels of these slots."""
        if bool((slots != 0).any()):
            self.tracer.findings.pin(slots, self.reason(text, remedy))

    def pin_owner(self, owner: Owner, text: str, remedy: str = "", dim: int = 0) -> None:
        """Pin every position of a parameter, and list it as a group of its own unless it has one."""
        self.pin(owner.slots(), text, remedy)
        if len(owner.shape) > 1 and not owner.is_buffer:
            dim %= len(owner.shape)
            self.tracer.findings.owners.setdefault((owner.name, dim), owner.name)


Rule = Callable[[Call], Result]


@dataclass(slots=True)
class _Kind:
    name: str
    label: str
    overload: str
    rule: Rule | None
    reads: bool
    writes: tuple[int, ...]


@dataclass(slots=True)
class _Block:
    """One storage: the values of the views of it that were met; `keep` keeps its memory from being given out again."""

    keep: Any
    values: dict[Geometry, Value] = field(default_factory=dict)


def _flatten(items: Iterable[Any]) -> list[Tensor]:
    out: list[Tensor] = []
    for item in items:
        if isinstance(item, Tensor):
            out.append(item)
        elif isinstance(item, (list, tuple)):
            out.extend(_flatten(item))
    return out


def _geometry(tensor: Tensor) -> Geometry:
    return tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride())


def _strided(flat: IntArray, geometry: Geometry) -> IntArray:
    offset, shape, stride = geometry
    return np.lib.stride_tricks.as_strided(flat[offset:], shape, [8 * s for s in stride])


class Tracer:
    """Follows one forward pass of `model` in one mode and writes what the rules find into `findings`."""

    def __init__(
        self,
        findings: Findings,
        model: nn.Module,
        tensors: Mapping[str, Tensor],
        inputs: Iterable[Tensor],
        rules: Mapping[str, tuple[Rule, bool]],
        mode: str,
    ) -> None:
        self.findings = findings
        self.mode = mode
        self._rules = rules
        self._kinds: dict[Any, _Kind] = {}
        self._names = {id(module): name for name, module in model.named_modules()}
        self._stack: list[tuple[str, nn.Module, Value | None]] = []
        self._blocks: dict[int, _Block] = {}
        self._owned: dict[int, list[tuple[int, Owner]]] = {}
        self._originals: set[int] = set()
        self._keep: list[Any] = []
        for name, tensor in tensors.items():
            self._own(tensor, findings.slots.owners[name], tensor.storage_offset())
        self._originals = set(self._owned)
        self._inputs = {self._storage(t)[0] for t in inputs}

    # -- tensors ------------------------------------------------------------------------------------------------

    def _storage(self, tensor: Tensor) -> tuple[int, Any]:
        try:
            storage = tensor.untyped_storage()
        except (RuntimeError, NotImplementedError):  # sparse and other tensors without one are known by identity
            self._keep.append(tensor)
            return id(tensor), tensor
        return storage._cdata, storage

    def _own(self, tensor: Tensor, owner: Owner, start: int) -> None:
        key, storage = self._storage(tensor)
        self._keep.append(storage)
        self._owned.setdefault(key, []).append((start, owner))

    def view(self, tensor: Tensor) -> View | None:
        """Return which part of which parameter or buffer this tensor is, or None."""
        if not self._owned or tensor.layout is not torch.strided:
            return None
        owned = self._owned.get(self._storage(tensor)[0])
        if owned is None:
            return None
        offset = tensor.storage_offset()
        for start, owner in owned:
            if start <= offset < start + owner.span:
                return self.findings.slots.view(owner, offset - start, tensor)
        return None

    def adopt(self, copy: Tensor, original: Tensor) -> bool:
        """Let a copy of a parameter's view, laid out alike, stand for the parameter too."""
        view = self.view(original)
        if view is None or copy.stride() != original.stride():
            return False
        start = next(s for s, o in self._owned[self._storage(original)[0]] if o is view.owner)
        shift = copy.storage_offset() - original.storage_offset()
        self._own(copy, view.owner, start + shift)
        return True

    def value(self, tensor: Tensor) -> Value:
        """Return what is known of an operand; a parameter along one axis of which it runs gives that axis' slots."""
        view = self.view(tensor)
        if view is not None:
            return self._as_value(view)
        key, _ = self._storage(tensor)
        block = self._blocks.get(key)
        if block is None:
            return nothing(tensor.dim(), "the network input" if key in self._inputs else "a constant")
        found = block.values.get(_geometry(tensor))
        if found is None:
            text = "left a view behind that cannot be followed"
            for value in block.values.values():
                self.findings.pin(value.ids, Reason(f"an operator in '{self.module_name}' {text}", self.where()))
            found = nothing(tensor.dim(), "a view that cannot be followed")
        return found

    def _as_value(self, view: View) -> Value:
        varied = view.varied()
        self.read(view.owner, "operator")
        if view.dims is not None and len(varied) == 1:
            return Value(view.slots(varied[0]), origin=f"'{view.owner.name}'")
        if view.dims is None or varied:
            text = f"operators rearrange or change '{view.owner.name}' before it is used"
            self.findings.pin(view.owner.slots(), Reason(text, self.where()))
        return nothing(view.ndim, f"'{view.owner.name}'")

    def put(self, tensor: Tensor, value: Value) -> None:
        """Record the value of a new tensor (or of a new view)."""
        key, storage = self._storage(tensor)
        if key in self._owned:
            return
        block = self._blocks.get(key)
        if block is None:
            block = self._blocks[key] = _Block(storage)
        block.values[_geometry(tensor)] = value

    def write(self, tensor: Tensor, value: Value) -> None:
        """Record that `tensor` was overwritten in place; views that share its memory follow."""
        key, _ = self._storage(tensor)
        if key in self._owned:
            self._write_owned(key, tensor)
            return
        block, geometry = self._blocks.get(key), _geometry(tensor)
        if block is None:
            self.put(tensor, value)
            return
        old = block.values.get(geometry)
        others = [g for g in block.values if g != geometry]
        if not others:
            block.values[geometry] = value
        elif old is not None and np.array_equal(old.ids, value.ids):
            for other in others:
                found = block.values[other]
                block.values[other] = Value(found.ids, origin=found.origin, paths=spoiled([found.paths]))
            block.values[geometry] = value
        else:
            self._rebuild(tensor, block, value)

    def _write_owned(self, key: int, tensor: Tensor) -> None:
        view = self.view(tensor)
        if view is not None and not (view.owner.is_buffer and key in self._originals):
            text = f"an operator overwrites '{view.owner.name}' during the forward pass"
            self.findings.pin(view.owner.slots(), Reason(text, self.where()))

    def _rebuild(self, tensor: Tensor, block: _Block, value: Value) -> None:
        size = tensor.untyped_storage().nbytes() // max(1, tensor.element_size())
        if size > SIZE_LIMIT:
            for found in (*block.values.values(), value):
                self.findings.pin(found.ids, Reason("a write into part of a very large tensor", self.where()))
            block.values = {g: nothing(len(g[1])) for g in block.values}
            return
        flat = np.zeros(size, dtype=np.int64)
        for geometry, found in block.values.items():
            _strided(flat, geometry)[...] = found.ids
        _strided(flat, _geometry(tensor))[...] = value.ids
        paths = spoiled([found.paths for found in (*block.values.values(), value)])
        for geometry, found in list(block.values.items()):
            ids = collapse(np.array(_strided(flat, geometry)))
            block.values[geometry] = Value(ids, free=found.free and value.free, origin=value.origin, paths=paths)
        block.values[_geometry(tensor)] = replace(value, ids=collapse(np.array(_strided(flat, _geometry(tensor)))))

    # -- modules ------------------------------------------------------------------------------------------------

    @property
    def module_name(self) -> str:
        """Qualified name of the innermost running module."""
        return self._stack[-1][0] if self._stack else ""

    @property
    def module(self) -> nn.Module | None:
        """The innermost running module."""
        return self._stack[-1][1] if self._stack else None

    def entered(self, module: nn.Module, args: Any) -> None:
        """Note that a module's forward begins."""
        value = None
        if type(module) in _COMPOSITE and args and isinstance(args[0], Tensor):
            value = self.value(args[0])
        self._stack.append((self._names.get(id(module), type(module).__name__), module, value))

    def left(self, module: nn.Module, output: Any) -> None:
        """Note that a module's forward ended."""
        if not self._stack:
            return
        _, _, value = self._stack.pop()
        if value is not None and isinstance(output, Tensor) and self.view(output) is None:
            name = _COMPOSITE[type(module)]
            paths = {
                key: None if path is None or path.activated else replace(path, activation=name, activated=True)
                for key, path in value.paths.items()
            }
            self.put(output, replace(self.value(output), paths=paths))

    def owner_of(self, module: nn.Module, leaf: str) -> Owner | None:
        """Return the raw parameter or buffer that `module.leaf` is, or None (absent, or computed)."""
        tensor = getattr(module, leaf, None)
        view = self.view(tensor) if isinstance(tensor, Tensor) else None
        return view.owner if view is not None and view.whole else None

    def read(self, owner: Owner, reader: str) -> None:
        """Note who reads a parameter or buffer: its own module, or some operator."""
        module = self.module
        if module is not None and any(t is not None and self._is(t, owner) for t in self._direct(module)):
            reader = self.module_name
        if reader not in self.findings.reads[owner.name]:
            self.findings.reads[owner.name].add(reader)

    def _is(self, tensor: Tensor, owner: Owner) -> bool:
        return any(o is owner for _, o in self._owned.get(self._storage(tensor)[0], ()))

    @staticmethod
    def _direct(module: nn.Module) -> Iterable[Tensor | None]:
        return (*module._parameters.values(), *module._buffers.values())

    def where(self) -> str:
        """Return the line of the user's model that is running, "" where only library modules are."""
        frame = sys._getframe(1)
        while frame is not None and frame.f_code not in FRAME_MARKS:
            path = frame.f_code.co_filename
            if not path.startswith((_TORCH, _HERE, "<")):
                return f"{os.path.basename(path)}:{frame.f_lineno}"
            if frame.f_back is None:
                break
            frame = frame.f_back
        return ""

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
            if name in _SIDE_WRITES:
                writes = ()
            usable = space == "aten" and (not writes or inplace) and name not in _IN_PLACE_SHAPES
            rule, reads = (self._rules.get(base) if usable else None) or (None, True)
            kind = _Kind(base, f"{space}.{name}", func._overloadname, rule, reads, writes)
            self._kinds[func] = kind
        return kind

    def executed(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> None:
        """Send the ids through one operator that has just run."""
        kind = self._kind(func)
        outs = _flatten((out,))
        call = Call(self, kind.name, kind.label, kind.overload, args, kwargs, outs, bool(kind.writes))
        if kind.reads:
            self._note_reads(call)
        result: Result = None
        try:
            result = kind.rule(call) if kind.rule is not None else no_rule(call)
        except TooLargeError:
            result = no_rule(call, "is too large to be followed")
        except (LookupError, TypeError, ValueError):  # called in a way that its rule does not know
            result = no_rule(call, "could not be followed")
        values = [result] * len(outs[:1]) if isinstance(result, Value) else list(result or ())
        values += [None] * (len(outs) - len(values))
        if kind.writes:
            self._written(call, kind, values)
            return
        for tensor, value in zip(outs, values, strict=False):
            if value is None:
                value = nothing(tensor.dim(), f"the result of {kind.label}")
            self.put(tensor, value)

    def _written(self, call: Call, kind: _Kind, values: list[Value | None]) -> None:
        targets = [call.args[i] for i in kind.writes if i < len(call.args) and isinstance(call.args[i], Tensor)]
        targets += [t for t in _flatten(call.kwargs.values()) if any(t is o for o in call.outs)]
        for i, tensor in enumerate(targets):
            value = values[i] if i < len(values) else None
            self.write(tensor, value or nothing(tensor.dim(), f"the result of {call.label}"))
        known = {self._storage(t)[0] for t in targets}
        for tensor in call.outs:
            if self._storage(tensor)[0] not in known:
                self.put(tensor, nothing(tensor.dim(), f"the result of {call.label}"))

    def _note_reads(self, call: Call) -> None:
        for tensor in call.tensors():
            view = self.view(tensor)
            if view is not None:
                self.read(view.owner, "operator")
                continue
            block = self._blocks.get(self._storage(tensor)[0])
            value = block.values.get(_geometry(tensor)) if block is not None else None
            if value is not None and value.source is not None:
                self.findings.readers[value.source].add("operator")

    def finished(self, outputs: Sequence[Tensor]) -> None:
        """Pin what the model returns."""
        for tensor in outputs:
            view = self.view(tensor)
            if view is not None:
                self.findings.pin(view.owner.slots(), Reason("the model returns it"))
                continue
            value = self.value(tensor)
            self.findings.pin(value.ids, Reason("they are the network's output"))
            if value.source is not None:
                self.findings.readers[value.source].add("output")


def no_rule(call: Call, text: str = "has no rule") -> Result:
    """Pin everything that reaches an operator; its results carry no channels."""
    remedy = "Register one with register_rule(), or leave it out with exclude=." if text == "has no rule" else ""
    for tensor in call.tensors():
        view = call.tracer.view(tensor)
        if view is not None:
            call.pin_owner(view.owner, text, remedy, dim=-1 if call.name.startswith("embedding") else 0)
        else:
            call.pin(call.tracer.value(tensor).ids, text, remedy)
    return None
