"""Wrappers around models and optimizers, of whatever kind: taken off, set up for new shapes, laid out over ranks.

Holds: what the other packages ask of all kinds. Elsewhere: the kinds (protocol.py lists them), sharded tensors
(sharded.py), the other checks of arguments (model.arguments).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from apoptosis.distributed.protocol import Layout, Wrapper, kind_of, kinds, kinds_in_place
from apoptosis.errors import ArgumentError


class Unwrapped(NamedTuple):
    """A model without the wrappers around it. wrappers: around it, outermost first."""

    model: nn.Module
    wrappers: tuple[nn.Module, ...] = ()


def unwrap(model: nn.Module) -> Unwrapped:
    """Take off all wrappers around a model, in any order, and check them and what is inside.

    Raises: ArgumentError: a wrapper that removal does not reach through, by name, with the remedy.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> unwrap(net).model is net
        True
        >>> unwrap(nn.DataParallel(net))
        Traceback (most recent call last):
        ...
        apoptosis.errors.ArgumentError: the model is a DataParallel: it copies the module to every device at each ...
    """
    found = Unwrapped(unwrapped(model), wrappers_of(model))
    for wrapper in found.wrappers:
        kind_of(wrapper).check(wrapper, "")
    for name, module in found.model.named_modules():
        for kind in kinds():
            if not kind.in_place and kind.matches(module):
                kind.check(module, name)
    for kind in kinds_in_place():
        kind.check(found.model, "")
    return found


def unwrapped(model: nn.Module) -> nn.Module:
    """Return a model, or the wrapped model that an averaged copy holds, without its wrappers; nothing is checked."""
    if isinstance(model, AveragedModel) and kind_of(model.module).unwrap(model.module) is not None:
        model = model.module
    return model if (inner := kind_of(model).unwrap(model)) is None else unwrapped(inner)


def wrappers_of(model: nn.Module) -> tuple[nn.Module, ...]:
    """Return the wrappers around a model, outermost first."""
    inner = kind_of(model).unwrap(model)
    return () if inner is None else (model, *wrappers_of(inner))


def rebuild_wrappers(
    wrappers: Iterable[nn.Module],
    model: nn.Module,
    optimizers: Iterable[Optimizer] = (),
    layouts: Sequence[Layout | None] = (),
) -> None:
    """Let wrappers of models and optimizers take the tensors as they are now.

    After a rollback, too: a tensor that got its storage back has lost the hooks of DistributedDataParallel.

    Args:
        wrappers: around the model, as `wrappers_of` returns them.
        model: without them.
        optimizers: of the model.
        layouts: what `read_layouts` returned for these wrappers.
    """
    stored = iter(layouts)
    for wrapper in wrappers:
        kind = kind_of(wrapper)
        kind.rebuild(wrapper, None if kind.group(wrapper) is None else next(stored, None))
    for kind in kinds_in_place():
        kind.rebuild(model)
    for optimizer in optimizers:
        kind_of(optimizer).rebuild(optimizer)


def layouts_of(wrappers: Iterable[nn.Module]) -> list[Layout | None]:
    """Say how every wrapper over a process group has gradients laid out, for a checkpoint. Nothing is exchanged."""
    return [kind.layout(wrapper) for kind, wrapper, _ in _over_ranks(wrappers)]


def read_layouts(wrappers: Iterable[nn.Module], stored: Any) -> list[Layout | None]:
    """Read what `layouts_of` returned, as a checkpoint holds it; of more wrappers or fewer, the first ones count.

    Raises: KeyError, TypeError, ValueError: it is damaged; the caller words it.
    """
    pairs = zip(_over_ranks(wrappers), stored, strict=False)
    return [None if one is None else kind.read_layout(one) for (kind, _, _), one in pairs]


def group_of(wrappers: Iterable[nn.Module], model: nn.Module) -> Any:
    """Return the process group that trains a model together; None for one process that acts alone."""
    return next((group for _, _, group in _over_ranks(wrappers, model)), None)


def _over_ranks(wrappers: Iterable[nn.Module], *models: nn.Module) -> Iterator[tuple[Wrapper, nn.Module, Any]]:
    """Yield (kind, wrapped, process group): wrappers outermost first, then what is done to the model in place."""
    around = [(kind_of(wrapper), wrapper) for wrapper in wrappers]
    for kind, wrapped in (*around, *((kind, model) for model in models for kind in kinds_in_place())):
        if (group := kind.group(wrapped)) is not None:
            yield kind, wrapped, group


def check_alone(found: Unwrapped) -> Unwrapped:
    """Refuse models of several processes where one process acts alone; return what was given.

    Raises: ArgumentError: there are several.
    """
    for kind, _, group in _over_ranks(found.wrappers, found.model):
        size = group.size()
        if size > 1 or kind.in_place:
            over = f"{kind.name} over {size} {'processes' if size > 1 else 'process'}"
            raise ArgumentError(
                f"the model is trained by several processes ({over}), and each of them would have to remove the same "
                "channels. Call shrink_ in one process, on the trained model before it is wrapped or sharded, or let "
                "Apoptosis shrink it while it trains."
            )
    return found


def step_checks(wrappers: Iterable[nn.Module]) -> tuple[Callable[[], None], ...]:
    """Return what every training step has to call: the `check_step` of wrappers that have one."""
    kinds_of = ((kind_of(wrapper), wrapper) for wrapper in wrappers)
    return tuple(partial(k.check_step, w) for k, w in kinds_of if type(k).check_step is not Wrapper.check_step)


def kind_in_place(module: nn.Module) -> str:
    """Return the name of the wrapper that has changed this very module in place, "" for none."""
    return next((kind.name for kind in kinds_in_place() if kind.matches(module)), "")


def inner_optimizer(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer that holds this rank's state: the one inside a wrapper, else itself.

    Raises: UnsupportedOptimizerError: the wrapper keeps no state that could follow.
    """
    found: Optimizer | None = kind_of(optimizer).unwrap(optimizer)
    return optimizer if found is None else found
