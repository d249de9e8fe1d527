"""Optimizers inside of optimizers: Lookahead, SAM, accelerate's and others wrap one that makes the step.

Holds: which optimizers an optimizer is made of, and what it keeps where no edit reaches it. Elsewhere:
how state follows an edit (optimizers.py), trying that on a copy (dry_run.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from apoptosis.distributed.wrappers import inner_optimizer
from apoptosis.errors import UnsupportedOptimizerError

_DEPTH = 4  # of lists and dictionaries in an attribute, in which tensors are looked for
_OWN = frozenset(("state", "param_groups", "defaults"))


def layers(optimizer: Optimizer) -> tuple[Optimizer, ...]:
    """Return the optimizers that hold state for this one's parameters, the innermost first; itself where it wraps none.

    Two that share one state are one: the inner one, whose class knows what the state means.

    Example:
        >>> import torch
        >>> class Wrapper(torch.optim.Optimizer):
        ...     def __init__(self, base):
        ...         super().__init__(base.param_groups, {})
        ...         self.base_optimizer = base
        >>> adam = torch.optim.Adam([torch.nn.Parameter(torch.ones(2))])
        >>> [type(each).__name__ for each in layers(Wrapper(adam))]
        ['Adam', 'Wrapper']
    """
    found: list[Optimizer] = []
    _gather(inner_optimizer(optimizer), found, [])
    unique: dict[int, Optimizer] = {}
    for each in found:
        unique.setdefault(id(each.state), each)
    return tuple(unique.values())


def _gather(optimizer: Optimizer, found: list[Optimizer], seen: list[Optimizer]) -> None:
    if any(optimizer is other for other in seen):
        return
    seen.append(optimizer)
    for name, value in vars(optimizer).items():
        for inner in () if name in _OWN else _leaves(value, Optimizer, _DEPTH):
            _gather(inner_optimizer(inner), found, seen)
    found.append(optimizer)


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """Return the parameters of an optimizer and of all that it wraps, each once."""
    members = (p for each in (optimizer, *layers(optimizer)) for group in each.param_groups for p in group["params"])
    return list({id(p): p for p in members}.values())


def check_kept(optimizer: Optimizer, names: Mapping[int, str]) -> None:
    """Refuse an optimizer that keeps tensors as large as the model's parameters where no edit reaches them.

    Args: names: id of each of the model's parameters -> its name.

    Raises: UnsupportedOptimizerError: copies of parameters in an inner optimizer, or such tensors in an attribute or in
        a parameter group.
    """
    every = layers(optimizer)
    states = [each.state for each in every]
    for each in dict.fromkeys((*every, inner_optimizer(optimizer))):
        members = [p for group in each.param_groups for p in group["params"]]
        if members and not any(id(p) in names for p in members):
            raise UnsupportedOptimizerError(
                f"{type(optimizer).__name__} steps on copies of the model's parameters, which its inner "
                f"{type(each).__name__} holds (master weights): they would keep the old shapes. Use an optimizer that "
                "steps on the parameters themselves."
            )
        own = [p for p in members if id(p) in names]
        shapes = {tuple(p.shape): names[id(p)] for p in own if p.numel() > 1}
        total = sum(p.numel() for p in own)
        known = {*names, *(id(p) for p in members)}
        for place, value in _places(each):
            if any(value is state for state in states):
                continue
            for tensor in _leaves(value, Tensor, _DEPTH):
                shape = tuple(tensor.shape)
                if id(tensor) not in known and (shape in shapes or shape == (total,)):
                    like = f"parameter '{shapes[shape]}'" if shape in shapes else "all parameters together"
                    raise UnsupportedOptimizerError(
                        f"{type(each).__name__} keeps a tensor of the shape of {like} {shape} in its {place}, where no "
                        "removal reaches it. Use an optimizer that keeps its tensors in `state[parameter]`."
                    )


def _places(optimizer: Optimizer) -> Iterator[tuple[str, Any]]:
    """Yield all that an optimizer holds beside its parameters and their state, with what it is called."""
    for name, value in vars(optimizer).items():
        if name not in _OWN:
            yield f"attribute '{name}'", value
    for group in optimizer.param_groups:
        for name, value in group.items():
            if name != "params":
                yield f"parameter groups' '{name}'", value
    state: Mapping[Any, Any] = optimizer.state
    for key, value in state.items():
        if not isinstance(key, Tensor):
            yield f"state[{key!r}]", value


def _leaves(value: Any, kind: type[Any], depth: int) -> Iterator[Any]:
    if isinstance(value, kind):
        yield value
    elif depth and isinstance(value, Mapping):
        for item in value.values():
            yield from _leaves(item, kind, depth - 1)
    elif depth and isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for item in value:
            yield from _leaves(item, kind, depth - 1)
