"""Passes over fake tensors, in which what no parameter or input goes into keeps its numbers.

Holds: which operators run on numbers although the weights have none, and models with fake tensors in the places of
real ones. Elsewhere: what a rule does where numbers are missing (graph.rules).

Networks read numbers off tensors that they make themselves: rates of dropped layers, positions in windows, masks. Such
tensors stay real as long as nothing fake is written into them, so that these passes run without data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._pytree import tree_map_only

from apoptosis.model.dispatch import DispatchMode
from apoptosis.model.module_state import storage_of

LARGE = 1 << 22
"""Elements of a tensor that is not made for its numbers' sake."""


def fake_mode_of(model: nn.Module) -> FakeTensorMode | None:
    """Return the mode of a model's fake tensors, None where all of them are real."""
    tensors = (*model.parameters(), *model.buffers())
    return next((tensor.fake_mode for tensor in tensors if isinstance(tensor, FakeTensor)), None)


class Constants:
    """Runs operators under a FakeTensorMode: with numbers where all operands have them, without where one has none.

    A real tensor that was written to from fake ones has the numbers of before; what is computed from it has none.
    """

    def __init__(self) -> None:
        self._stale: dict[int, Any] = {}

    def run(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run one operator; what is written in place is returned as the same object."""
        tensors = [t for t in _flat((*args, *kwargs.values())) if isinstance(t, Tensor)]
        real = not any(isinstance(t, FakeTensor) for t in tensors)
        known = real and not any(self._is_stale(t) for t in tensors)
        if known and not tensors:  # a factory: nothing large is filled
            out = func(*args, **kwargs)
            if sum(t.numel() for t in _flat((out,)) if isinstance(t, Tensor)) > LARGE:
                return out
        if known or (real and _is_view(func)):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if any(not isinstance(t, FakeTensor) and not t.is_leaf for t in tensors):
            out = _without_history(func, args, kwargs)
        else:
            out = func(*args, **kwargs)
        written = [args[i] for i in _written(func) if i < len(args) and isinstance(args[i], Tensor)]
        for tensor in written:
            if not isinstance(tensor, FakeTensor):
                storage = storage_of(tensor)
                if storage is not None:
                    self._stale[storage._cdata] = storage
        return written[0] if written and isinstance(out, Tensor) else out

    def _is_stale(self, tensor: Tensor) -> bool:
        storage = storage_of(tensor) if self._stale else None
        return storage is not None and storage._cdata in self._stale


class _Building(DispatchMode):
    """Lets what a factory computes from constants have numbers."""

    def __init__(self) -> None:
        super().__init__()
        self._constants = Constants()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "prim":
            return func(*args, **(kwargs or {}))
        return self._constants.run(func, args, kwargs or {})


@contextmanager
def built_fake() -> Iterator[FakeTensorMode]:
    """Build what is built inside without memory for large tensors; small ones are real (see `make_fake`).

    Yields: the mode of the fake tensors.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, _Building():
        yield mode


def make_fake(model: nn.Module, mode: FakeTensorMode) -> None:
    """Put fake tensors in the places of a model's real parameters and buffers; tied ones stay tied."""
    known: dict[int, Tensor] = {}
    for module in model.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for named in tables:
            for name, tensor in named.items():
                if tensor is not None and not isinstance(tensor, FakeTensor):
                    named[name] = known.setdefault(id(tensor), mode.from_tensor(tensor))


@contextmanager
def over_fakes(model: nn.Module) -> Iterator[Constants | None]:
    """Let a pass over fake parameters make no large real tensors, whether or not their mode is on.

    Yields: what runs the operators of the pass, None where the parameters are real.
    """
    mode = fake_mode_of(model)
    if mode is None:
        yield None
        return
    before = mode.allow_non_fake_inputs
    mode.allow_non_fake_inputs = True
    try:
        with mode:
            yield Constants()
    finally:
        mode.allow_non_fake_inputs = before


def _flat(items: tuple[Any, ...]) -> Iterator[Any]:
    for item in items:
        if isinstance(item, list | tuple):
            yield from _flat(tuple(item))
        else:
            yield item


def _without_history(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run an operator on real tensors that are no leaves as if they were: else they do not turn fake."""

    def leaf(tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor) or tensor.is_leaf:
            return tensor
        with unset_fake_temporarily():
            return tensor.detach()

    args, named = tree_map_only(Tensor, leaf, (args, dict(kwargs)))
    return func(*args, **named)


def _is_view(func: Any) -> bool:
    alias = func._schema.returns[0].alias_info if func._schema.returns else None
    return alias is not None and not alias.is_write


def _written(func: Any) -> Iterator[int]:
    return (i for i, a in enumerate(func._schema.arguments) if a.alias_info is not None and a.alias_info.is_write)
