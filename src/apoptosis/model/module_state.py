"""What a forward pass may change beside its outputs, recorded before it and put back after it.

Holds: attributes of modules and what is reached through them (lists, dicts, sets, deques, plain objects, arrays,
random generators), tensors written in place, gradients, global random states. Elsewhere: running the pass
(passes.py).

Containers are copied shallowly, tensors only once something writes to them. What is put back is put back in place, so
that whoever holds a container finds it as it was. Not recorded: attributes of classes, globals, what functions
enclose, and more than `LIMIT` objects.
"""

from __future__ import annotations

import random
import re
import threading
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from enum import Enum
from functools import lru_cache, partial
from io import IOBase
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from apoptosis.model.dispatch import DispatchMode

LIMIT = 20_000  # objects that are looked into; the nearest to the modules come first
DEPTH = 5  # plain objects within one another that are looked into
_ARRAY_BYTES = 1 << 24  # larger arrays of numpy are taken for data, which no pass changes

_HOOKS = frozenset(name for name in vars(nn.Module()) if "hook" in name)
_LEAVES = (
    type(None), bool, int, float, complex, str, bytes, type, types.ModuleType, types.FunctionType, types.MethodType,
    types.BuiltinFunctionType, partial, property, Enum, Optimizer, IOBase, re.Pattern, threading.Thread,
    weakref.ReferenceType, weakref.WeakKeyDictionary, weakref.WeakValueDictionary, torch.dtype, torch.device,
    torch.Size, torch.jit.ScriptFunction, np.generic, np.dtype,
)  # fmt: skip
_NEVER = ("torch.distributed", "torch._dynamo", "torch.fx", "torch.autograd", "threading", "logging", "concurrent")

Path = tuple[str | int, ...]
"""Where a tensor is: the module's name, the attribute, then keys and places inside of it."""

Exchange = tuple[Callable[[Any], object], Any, Any]
"""A setter of one entry of a container, the value that it has and the one that it is to have."""


class _Container:
    """Content of a list, dict, set, deque or of an object's attributes; `put` writes it back."""

    def __init__(self, item: Any, copy: Callable[[Any], Any], put: Callable[[Any, Any], None]) -> None:
        self._item, self._copy, self._put, self.content = item, copy, put, copy(item)

    def restore(self) -> None:
        """Write the content back, where it is another one now."""
        if not _alike(self._copy(self._item), self.content):
            self._put(self._item, self.content)

    def exchanges(self, new: Mapping[int, Any]) -> Iterator[Exchange]:
        """Yield (setter, old value, new value) for every entry that holds one of some objects, by their ids.

        New tuples are made. Entries of sets stay.
        """
        if isinstance(self.content, set):
            return
        for key, old in list(self.content.items() if isinstance(self.content, dict) else enumerate(self.content)):
            value = _substituted(old, new)
            if value is not old:
                yield partial(_SETTERS[self._put], self._item, key), old, value


def _substituted(item: Any, new: Mapping[int, Any]) -> Any:
    if id(item) in new:
        return new[id(item)]
    if not isinstance(item, tuple):
        return item
    parts = [_substituted(part, new) for part in item]
    if all(part is old for part, old in zip(parts, item, strict=True)):
        return item
    kind: Any = type(item)
    return kind(*parts) if hasattr(kind, "_fields") else kind(parts)


def _alike(now: Any, before: Any) -> bool:
    """Whether two contents hold the very same objects in the same order."""
    if len(now) != len(before):
        return False
    if isinstance(before, dict):
        pairs = zip(now.items(), before.items(), strict=True)
        return all(k is old_k and v is old_v for (k, v), (old_k, old_v) in pairs)
    if isinstance(before, set):
        return bool(now == before)
    return all(a is b for a, b in zip(now, before, strict=True))


def _put_dict(item: Any, content: dict[Any, Any]) -> None:
    kind: Any = OrderedDict if isinstance(item, OrderedDict) else dict
    kind.clear(item)
    for key, value in content.items():
        kind.__setitem__(item, key, value)


def _put_list(item: Any, content: list[Any]) -> None:
    list.__setitem__(item, slice(None), content)


def _put_set(item: Any, content: set[Any]) -> None:
    set.clear(item)
    set.update(item, content)


def _put_deque(item: Any, content: list[Any]) -> None:
    deque.clear(item)
    deque.extend(item, content)


def _put_slots(item: Any, content: dict[str, Any]) -> None:
    for name in _slots_of(_kind(item)):
        if name in content:
            object.__setattr__(item, name, content[name])
        elif hasattr(item, name):
            object.__delattr__(item, name)


@lru_cache(maxsize=1024)
def _slots_of(kind: Hashable) -> list[str]:
    found: list[str] = []
    for cls in getattr(kind, "__mro__", ()):
        own = vars(cls).get("__slots__", ())
        for name in (own,) if isinstance(own, str) else tuple(own):
            if name not in ("__dict__", "__weakref__"):
                found.append(f"_{cls.__name__.lstrip('_')}{name}" if name[:2] == "__" != name[-2:] else name)
    return found


def _read_slots(item: Any) -> dict[str, Any]:
    return {name: getattr(item, name) for name in _slots_of(_kind(item)) if hasattr(item, name)}


def _attributes(item: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(item).items() if name not in _HOOKS}


def _put_attributes(item: Any, content: dict[str, Any]) -> None:
    own = vars(item)
    for name in [name for name in own if name not in content and name not in _HOOKS]:
        del own[name]
    own.update(content)
    if [name for name in own if name not in _HOOKS] != list(content):  # one was gone: the order is part of it
        for name, value in content.items():
            own.pop(name, None)
            own[name] = value


_SETTERS: dict[Any, Callable[[Any, Any, Any], object]] = {
    _put_dict: dict.__setitem__,
    _put_list: list.__setitem__,
    _put_deque: deque.__setitem__,
    _put_attributes: lambda item, name, value: vars(item).__setitem__(name, value),
    _put_slots: object.__setattr__,
}
"""How one entry is set, past setters of the user's, by how the whole content is."""


class _Number:
    """State of a random generator, or the content of an array: read once, written back where it has moved."""

    def __init__(self, read: Callable[[], Any], write: Callable[[Any], object]) -> None:
        self._write, self._state = write, read()

    def restore(self) -> None:
        """Write the state back."""
        self._write(self._state)


class _TensorState:
    """Memory, shape, gradient and version of one tensor; its numbers are kept by `Written`, if it is written to."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._alias = tensor, tensor.detach()
        self._version = -1 if tensor.is_inference() else tensor._version
        self._grad = tensor.grad if tensor.is_leaf else None

    def restore(self) -> None:
        """Give the tensor its memory, shape and gradient again."""
        tensor, alias = self._tensor, self._alias
        if _geometry(tensor) != _geometry(alias):
            tensor.data = alias
        if tensor.is_leaf and tensor.grad is not self._grad:
            tensor.grad = self._grad
        if self._version >= 0 and tensor._version != self._version:  # the numbers are those of that version
            set_version(tensor, self._version)


def set_version(tensor: Tensor, version: int) -> None:
    """Say that a tensor holds the numbers of an earlier version of it again, for graphs that were made then."""
    change: Any = torch._C._autograd._unsafe_set_version_counter
    try:
        change((tensor,), (version,))
    except TypeError:  # torch before 2.7
        change(tensor, version)


def _geometry(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


class Written(DispatchMode):
    """Keeps a copy of what lies in some memory before an operator writes to it.

    Args: storages: by address, the memory to be kept.
    """

    def __init__(self, storages: Mapping[int, Any]) -> None:
        super().__init__()
        self._storages = storages
        self._kept: dict[int, tuple[Any, Any]] = {}
        self._writes: dict[Any, tuple[tuple[int, str], ...]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        writes = self._writes.get(func)
        if writes is None:
            writes = self._writes[func] = _written_by(func)
        for place, name in writes:
            target = args[place] if place < len(args) else kwargs.get(name)
            for tensor in target if isinstance(target, list | tuple) else (target,):
                if isinstance(tensor, Tensor):
                    self._keep(tensor)
        return func(*args, **kwargs)

    def _keep(self, tensor: Tensor) -> None:
        storage = storage_of(tensor)
        if storage is None or storage._cdata in self._kept or storage._cdata not in self._storages:
            return
        if storage.device.type != "meta":
            self._kept[storage._cdata] = storage, storage.clone()  # type: ignore[no-untyped-call]  # torch's own

    def restore(self) -> None:
        """Write back what was there."""
        for storage, before in self._kept.values():
            if storage.nbytes() != before.nbytes():
                storage.resize_(before.nbytes())
            storage.copy_(before)


def _written_by(func: Any) -> tuple[tuple[int, str], ...]:
    schema = getattr(func, "_schema", None)
    arguments = enumerate(schema.arguments if schema is not None else ())
    return tuple((i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write)


def storage_of(tensor: Tensor) -> torch.UntypedStorage | None:
    """Return the memory that a tensor lies in; None for sparse tensors and wrappers, which have none of their own."""
    try:
        return tensor.untyped_storage()
    except RuntimeError:  # NotImplementedError is one
        return None


class ModuleState:
    """All that a forward pass of a model may change, as it is now. `restore` can be called any number of times.

    Args: model: the model; read only.

    Attributes: written: a mode to run passes under.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> net.seen = []
        >>> state = ModuleState(net)
        >>> net.seen.append(1)
        >>> state.restore()
        >>> net.seen
        []
    """

    def __init__(self, model: nn.Module) -> None:
        walk = Walk(model)
        self._walk = walk
        storages = {s._cdata: s for t in walk.all_tensors if (s := storage_of(t)) is not None}
        self.written = Written(storages)
        self._tensors = [_TensorState(t) for t in walk.all_tensors if _is_plain(t)]
        self._flags = [(m, m.training) for m in model.modules()]
        self._random = random_states(p.device for p in model.parameters())

    def restore(self) -> None:
        """Put everything back."""
        for parts in (self._walk.containers, self._walk.numbers, self._random):
            for part in parts:
                part.restore()
        for module, flag in self._flags:
            if module.training != flag:  # of compiled scripts, which have no attributes of their own
                module.training = flag
        with torch.no_grad():
            self.written.restore()
            for tensor in self._tensors:
                tensor.restore()

    def tensors(self) -> dict[Path, Tensor]:
        """Return tensors in plain attributes, as they were, by their paths."""
        return self._walk.tensors


def name_of(path: Path) -> str:
    """Return the path of a tensor as a user would write it.

    Example:
        >>> name_of(("body.cell", "hidden", 0)), name_of(("", "memory", "left"))
        ('body.cell.hidden[0]', 'memory.left')
    """
    words = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in path if part != ""]
    return "".join(words).lstrip(".")


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and storage_of(tensor) is not None


def random_states(devices: Iterable[torch.device]) -> list[_Number]:
    """Return the states of the global generators: Python's, numpy's, torch's on the processor and on these devices."""
    found = [
        _Number(random.getstate, random.setstate),
        _Number(np.random.get_state, np.random.set_state),
        _Number(torch.default_generator.get_state, torch.default_generator.set_state),
    ]
    for device in {device for device in devices if device.type not in ("cpu", "meta")}:
        kind: Any = getattr(torch, device.type, None)
        if hasattr(kind, "get_rng_state") and hasattr(kind, "set_rng_state"):
            write = partial(lambda kind, device, state: kind.set_rng_state(state, device), kind, device)
            found.append(_Number(partial(kind.get_rng_state, device), write))
    return found


class Walk:
    """One walk over all that is reached from a model's modules by attributes.

    Attributes: containers, numbers: with their content. tensors: those in plain attributes. all_tensors: those, and
        parameters, buffers and gradients.
    """

    def __init__(self, model: nn.Module) -> None:
        self.containers: list[_Container] = []
        self.numbers: list[_Number] = []
        self.tensors: dict[Path, Tensor] = {}
        self.all_tensors: list[Tensor] = []
        self._seen: set[int] = set()
        self._names = {id(module): name for name, module in model.named_modules()}
        self._todo: deque[tuple[Path, Any, int]] = deque((((name,), m, 0) for name, m in model.named_modules()))
        self._own = {id(t) for t in (*model.parameters(), *model.buffers())}
        while self._todo and len(self._seen) < LIMIT + len(self._names):
            path, item, depth = self._todo.popleft()
            if id(item) not in self._seen and not _is_leaf(_kind(item)):
                self._seen.add(id(item))
                for key, part, further in self._visit(path, item, depth):
                    if not _is_leaf(_kind(part)):  # most are: asked before a path is made for it
                        self._todo.append(((*path, key), part, further))

    def _visit(self, path: Path, item: Any, depth: int) -> Iterator[tuple[str | int, Any, int]]:
        if isinstance(item, Tensor):
            self._note(path, item)
        elif isinstance(item, dict):
            yield from ((str(k), v, depth) for k, v in self._take(item, dict, _put_dict).items())
        elif isinstance(item, list):
            yield from ((i, v, depth) for i, v in enumerate(self._take(item, list, _put_list)))
        elif isinstance(item, tuple | frozenset):
            yield from ((i, v, depth) for i, v in enumerate(item))
        elif isinstance(item, set):
            yield from ((i, v, depth) for i, v in enumerate(self._take(item, set, _put_set)))
        elif isinstance(item, deque):
            yield from ((i, v, depth) for i, v in enumerate(self._take(item, list, _put_deque)))
        elif (number := _as_number(item)) is not None:
            self.numbers.append(number)
        elif not isinstance(item, np.ndarray):
            yield from self._object(item, depth)

    def _object(self, item: Any, depth: int) -> Iterator[tuple[str | int, Any, int]]:
        known = isinstance(item, nn.Module)
        if isinstance(item, torch.jit.ScriptModule) or (not known and (depth >= DEPTH or _is_foreign(_kind(item)))):
            return
        further = depth if known else depth + 1
        if isinstance(getattr(item, "__dict__", None), dict):
            content = self._take(item, _attributes, _put_attributes)
            yield from ((name, value, further) for name, value in content.items())
        if _slots_of(_kind(item)):
            content = self._take(item, _read_slots, _put_slots)
            yield from ((name, value, further) for name, value in content.items())

    def _take(self, item: Any, copy: Callable[[Any], Any], put: Callable[[Any, Any], None]) -> Any:
        container = _Container(item, copy, put)
        self.containers.append(container)
        return container.content

    def _note(self, path: Path, tensor: Tensor) -> None:
        self.all_tensors.append(tensor)
        if id(tensor) not in self._own:
            self.tensors[path] = tensor
        if tensor.is_leaf and tensor.grad is not None:
            self.all_tensors.append(tensor.grad)


def _kind(item: object) -> Any:
    return type(item)  # which mypy does not take for hashable


@lru_cache(maxsize=1024)
def _is_leaf(kind: Hashable) -> bool:
    return isinstance(kind, type) and issubclass(kind, _LEAVES)


@lru_cache(maxsize=1024)
def _is_foreign(kind: Hashable) -> bool:
    return str(getattr(kind, "__module__", "")).startswith(_NEVER)


def _as_number(item: Any) -> _Number | None:
    if isinstance(item, torch.Generator):
        return _Number(item.get_state, item.set_state)
    if isinstance(item, random.Random):
        return _Number(item.getstate, item.setstate)
    if isinstance(item, np.random.RandomState):
        return _Number(item.get_state, item.set_state)
    if isinstance(item, np.random.Generator):
        bits: Any = item.bit_generator
        return _Number(lambda: bits.state, lambda state: setattr(bits, "state", state))
    if isinstance(item, np.ndarray) and item.nbytes <= _ARRAY_BYTES and item.flags.writeable:
        return _Number(item.copy, lambda before: np.copyto(item, before))
    return None
