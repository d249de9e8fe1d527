"""Which modules a pass called, and of what every tensor of the pass is constant.

Holds: the record of calls, and for every tensor the layers of which it would be constant if their output were.
Elsewhere: what follows for residual branches (groups/branches.py), channels (values.py).

Layers have a bit each. The output of a layer has its bit beside those of its input; whatever is computed from several
tensors has the bits that all of them have, and what depends on no input has all. A layer that is not among the bits of
the network's output may therefore become a constant, and the output still depends on the input.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from apoptosis.graph.trace.storage import Geometry, StorageMap, geometry
from apoptosis.modules.attention import is_attention
from apoptosis.records import IntArray

ALWAYS = -1
"""The bits of what depends on no input."""
_FILLS = ("new_", "bernoulli", "normal", "uniform", "random")  # whatever the numbers of their operand are
_PLAIN = (Tensor, int, float, complex, str, bool, type(None))


@dataclass(frozen=True, slots=True)
class Argument:
    """A tensor that a module was called with: place among the positional arguments (-1: none), name, shape, bits."""

    place: int
    name: str
    shape: tuple[int, ...]
    bits: int


@dataclass(slots=True)
class ModuleCall:
    """One call of a module.

    parent: place of the call that it ran in, -1 for the model's own. inputs: tensors it was called with. shape, ids,
    bits: of the first tensor that it returned; ids None where that is none of the pass. extras: how many values beside
    it, -1 where a tensor was returned. kept: attributes in which the module left tensors of the pass.
    odd: why the call cannot be replaced by another module, "" if it can. macs: multiply-adds from its begin to its end.
    """

    module: str
    parent: int
    inputs: tuple[Argument, ...] = ()
    shape: tuple[int, ...] = ()
    ids: IntArray | None = None
    bits: int = ALWAYS
    extras: int = -1
    odd: str = ""
    macs: float = 0.0


@dataclass(slots=True)
class CallLog:
    """What is written down over all passes of a model.

    bits: by name of a layer, its bit. calls: by mode. outputs: bits that some output of the network has. written: bits
    of what operators wrote to in place. users: by module, the modules that ran when its output was read by an operator,
    the innermost first; "" in place of them where the network returns it.
    """

    bits: dict[str, int] = field(default_factory=dict)
    calls: dict[str, list[ModuleCall]] = field(default_factory=dict)
    outputs: int = 0
    written: int = 0
    users: dict[str, set[tuple[str, ...]]] = field(default_factory=dict)


class Calls:
    """Follows the calls of modules in one pass.

    Args: log: written to. memory: of the pass. inputs: of the network. names: by id of a module, its name.
    """

    def __init__(
        self, log: CallLog, memory: StorageMap, inputs: Iterable[Tensor], names: Mapping[int, str], mode: str
    ) -> None:
        self._log, self._memory, self._names = log, memory, names
        self._bits: dict[int, dict[Geometry, int]] = {memory.place(x): {geometry(x): 0} for x in inputs if _known(x)}
        self._made: dict[tuple[int, Geometry], str] = {}
        self._calls = log.calls.setdefault(mode, [])
        self._calls.clear()
        self._stack: list[int] = []

    # ------------------------------------------------------------------ tensors

    def bits(self, tensor: Tensor) -> int:
        """Return the bits of a tensor; of a view that was not met, those that all of its memory has."""
        if not _known(tensor):
            return 0
        found = self._bits.get(self._memory.place(tensor))
        if found is None:
            return ALWAYS
        own = found.get(geometry(tensor))
        return own if own is not None else _shared(found.values())

    def operator(
        self,
        name: str,
        read: Sequence[Tensor],
        made: Sequence[Tensor],
        written: bool,
        running: Callable[[], tuple[str, ...]],
    ) -> None:
        """Follow an operator that has run.

        Args:
            name: of the operator.
            read: its operands.
            made: its results.
            written: it wrote to an operand.
            running: returns the modules that run, the innermost first.
        """
        bits, fills = ALWAYS, name.startswith(_FILLS) or name.endswith("_like")
        for tensor in () if fills else read:
            bits &= self.bits(tensor)
            if self._made and _known(tensor):
                self._note_user(tensor, made, written, running)
        for tensor in made if written else ():
            old = self.bits(tensor)
            self._log.written |= 0 if old == ALWAYS else old
        for tensor in made:
            if _known(tensor):
                self._set(tensor, bits, written)

    def _note_user(
        self, tensor: Tensor, made: Sequence[Tensor], written: bool, running: Callable[[], tuple[str, ...]]
    ) -> None:
        """Note who reads what a module made; a view of it is not read yet."""
        place = self._memory.place(tensor)
        maker = self._made.get((place, geometry(tensor)))
        if maker is None:
            return
        views = [] if written else [x for x in made if _known(x) and self._memory.place(x) == place]
        for view in views:
            self._made[place, geometry(view)] = maker
        if not views:
            self._log.users.setdefault(maker, set()).add(running())

    def _set(self, tensor: Tensor, bits: int, written: bool = False) -> None:
        own = self._bits.setdefault(self._memory.place(tensor), {})
        if written:  # to part of the memory, maybe
            for other in own:
                own[other] &= bits
        own[geometry(tensor)] = bits

    # ------------------------------------------------------------------ modules

    def enter(self, module: nn.Module, macs: float) -> None:
        """Note that a module's forward begins. macs: multiply-adds of the pass so far."""
        parent = self._stack[-1] if self._stack else -1
        self._stack.append(len(self._calls))
        self._calls.append(ModuleCall(self._names.get(id(module), ""), parent, macs=-macs))

    def leave(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any, macs: float
    ) -> None:
        """Note that a module's forward ended. macs: multiply-adds of the pass so far."""
        if not self._stack:
            return
        call = self._calls[self._stack.pop()]
        call.macs += macs
        given = _named(module, args, kwargs)
        call.inputs = tuple(
            Argument(place, name, tuple(x.shape), self.bits(x)) for place, name, x in given if isinstance(x, Tensor)
        )
        first = output if isinstance(output, Tensor) else None
        if type(output) is tuple and output and isinstance(output[0], Tensor):
            first, call.extras = output[0], len(output) - 1
        if first is None or not _known(first):
            call.odd = f"it returns a {type(output).__name__}"
            return
        odd = next((name for _, name, x in given if not _is_plain(x)), None)
        if odd is not None:
            call.odd = f"it is given an object as '{odd}', in which it may leave something"
        place = self._memory.place(first)
        if place not in self._bits and not self._memory.is_owned(first):  # of an operator that was not followed
            shared = ALWAYS
            for argument in call.inputs:
                shared &= argument.bits
            self._set(first, shared)
        if is_layer(module) and call.module:
            number = self._log.bits.setdefault(call.module, 1 << len(self._log.bits))
            self._set(first, self.bits(first) | number)
        if module._parameters and not module._modules and call.module:
            self._made[self._memory.place(first), geometry(first)] = call.module
        call.bits, call.shape = self.bits(first), tuple(first.shape)
        recorded = self._memory.recorded(first)
        call.ids = None if recorded is None or not recorded.ids.size else recorded.ids
        call.odd = call.odd or self._leaves(module)

    def _leaves(self, module: nn.Module) -> str:
        """Return which attribute holds a tensor of this pass, as a reason; "" for none."""
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and _known(value) and self._memory.place(value) in self._bits:
                return f"it leaves a tensor in its attribute '{name}'"
        return ""

    def finished(self, outputs: Iterable[Tensor]) -> None:
        """Note what the network returns."""
        for tensor in outputs:
            bits = self.bits(tensor)
            self._log.outputs |= 0 if bits == ALWAYS else bits
            if _known(tensor):
                name = self._made.get((self._memory.place(tensor), geometry(tensor)))
                if name is not None:
                    self._log.users.setdefault(name, set()).add(("",))


def is_layer(module: nn.Module) -> bool:
    """Whether a module may be the last layer of a branch: linear, a convolution, or attention as a whole."""
    if is_attention(module):
        return True
    if module._modules or "forward" in vars(module):
        return False
    if isinstance(module, nn.Linear | _ConvNd) and not isinstance(module, _ConvTransposeNd):
        return True
    return type(module).__qualname__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def _known(tensor: Tensor) -> bool:
    try:
        tensor.stride()
    except RuntimeError:  # without strides
        return False
    return True


def _shared(bits: Iterable[int]) -> int:
    found = ALWAYS
    for own in bits:
        found &= own
    return found


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if type(value) is dict:
        return all(map(_is_plain, value.values()))
    return isinstance(value, _PLAIN)


_NAMES: dict[Any, list[str]] = {}
"""By forward function, the names of its positional arguments."""


def _named(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[tuple[int, str, Any]]:
    """Return (place, name, value) of all arguments of a call; place -1 for what can be given by name alone."""
    function = type(module).forward
    if function not in _NAMES:
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        try:
            found = [p.name for p in inspect.signature(function).parameters.values() if p.kind in kinds]
        except (TypeError, ValueError):
            found = ["self"]
        _NAMES[function] = found[1:]
    names = _NAMES[function]
    places = {name: place for place, name in enumerate(names)}
    own = [(i, names[i] if i < len(names) else "", value) for i, value in enumerate(args)]
    return own + [(places.get(name, -1), name, value) for name, value in kwargs.items()]
