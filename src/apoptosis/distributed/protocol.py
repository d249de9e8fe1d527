"""What the library asks of a wrapper, and the registry of the kinds that it knows.

Holds: `Wrapper`, `register_wrapper`. Elsewhere: one file for each kind (compiled, ddp, fsdp, zero, refused); the
questions that the other packages ask of all kinds (wrappers.py about modules and optimizers, sharded.py about tensors).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from apoptosis.errors import ArgumentError

if TYPE_CHECKING:
    from apoptosis.distributed.ranks import Ranks

Layout = dict[str, Any]  # plain values, which a checkpoint keeps


class Wrapper:
    """One kind of wrapper: how to look inside it, and what it needs when widths change.

    There are wrappers around the user's module (DistributedDataParallel, torch.compile), wrappers around an optimizer
    (ZeroRedundancyOptimizer), and those that change a model in place and leave its modules what they are (fully_shard;
    `in_place`). Derive a class, override what applies, and give an instance to `register_wrapper`; every method but
    `matches` has a default for a wrapper to which the question does not apply.

    Arguments of all methods: `wrapped` is the wrapper, a module or an optimizer; for kinds with `in_place` it is the
    user's model. A method that refuses raises ArgumentError (of optimizers: UnsupportedOptimizerError) with the reason
    and a remedy; nothing has changed then.

    Attributes: name: of the kind, in messages. in_place: whether it changes a model in place.
    """

    name = ""
    in_place = False

    def matches(self, candidate: object) -> bool:
        """Whether a module or optimizer is such a wrapper; of kinds with `in_place`: whether a module was changed."""
        return False

    # ---- unwrap

    def unwrap(self, wrapped: Any) -> Any:
        """Return the module or optimizer directly inside; None where it holds none that the user's code made."""
        return None

    def check(self, wrapped: Any, name: str) -> None:
        """Refuse what removal does not reach through.

        Args: name: of the module inside the model; "" for the model itself and what is around it.
        """
        if name and type(self).rebuild is not Wrapper.rebuild:  # only wrappers around the whole model are rebuilt
            raise ArgumentError(
                f"module '{name}' is wrapped in {self.name} by itself, which would keep what it has set up for the old "
                "shapes. Wrap the whole model, or give apoptosis the wrapped module alone."
            )

    def check_step(self, wrapped: Any) -> None:
        """Refuse a call of step() where the wrapper may let some ranks run without others."""

    def check_ranks(self, wrapped: Any, size: int) -> None:
        """Refuse a wrapper over other processes than the `size` ranks that train the model together."""

    # ---- rebuild

    def rebuild(self, wrapped: Any, layout: Layout | None = None) -> None:
        """Set buffers, hooks and records up for the shapes that the parameters have now; all ranks call it together.

        Called after every event, rolled back ones included, and after `load`.

        Args: layout: what `layout` returned when a checkpoint was written; None: there is none.
        """

    # ---- layout over ranks

    def group(self, wrapped: Any) -> Any:
        """Return the torch.distributed process group that it works over; None for one process."""
        return None

    def ranks(self, wrapped: Any) -> Ranks | None:
        """Return ranks of another kind that sum its gradients (MPI's), which events then use; None for `group`."""
        return None

    def layout(self, wrapped: Any) -> Layout | None:
        """Say how gradients or parameters lie over ranks, beyond what follows from their shapes."""
        return None

    def read_layout(self, stored: Any) -> Layout:
        """Return a layout as a checkpoint holds it. Raises: KeyError, TypeError, ValueError: it is damaged."""
        found: Layout = {**stored}
        return found

    # ---- shard: tensors of which every rank holds a part; the defaults are those of plain tensors

    def is_sharded(self, tensor: object) -> bool:
        """Whether a tensor is one that this kind has spread over ranks."""
        return False

    def full_tensor(self, tensor: Any) -> Tensor:
        """Gather a sharded tensor; all ranks call it together. Returns: a plain tensor."""
        found: Tensor = tensor
        return found

    def shard_like(self, value: Tensor, like: Any) -> Tensor:
        """Spread a full tensor as `like` is spread; only the rank's own part stays in memory."""
        return value

    def empty_like(self, size: tuple[int, ...], dtype: torch.dtype, like: Any) -> Tensor:
        """Return a tensor of this full size without content, spread as `like` is; a plain one lies on the CPU."""
        return torch.empty(size, dtype=dtype, device="cpu")

    def swap_local_(self, tensor: Any, value: Tensor) -> None:
        """Give a tensor the storage and the shape of another one that is spread alike, under its identity."""
        tensor.set_(value)

    def reshard(self, model: nn.Module) -> None:
        """Let parameters that are gathered for a pass be sharded again; of kinds with `in_place`."""

    def unsharded_forward(self, model: nn.Module) -> AbstractContextManager[None]:
        """Let the library's own passes inside find full, plain parameters; of kinds with `in_place`."""
        return nullcontext()

    def full_state(self, wrapped: Any) -> Mapping[Tensor, Mapping[str, Any]]:
        """Return an optimizer's state of all parameters. Raises: CheckpointError: other ranks hold a part of it."""
        found: Mapping[Tensor, Mapping[str, Any]] = wrapped.state
        return found


_PLAIN = Wrapper()  # of what is no wrapper, and of plain tensors: the defaults
_REGISTERED: list[Wrapper] = []


def register_wrapper(kind: Wrapper) -> None:
    """Add a kind of wrapper; it is asked before those that are there.

    Args: kind: an instance of a class derived from `Wrapper`.

    Raises: ArgumentError: no Wrapper, no name, a name that is taken, or no `matches` of its own.

    Example:
        >>> from apoptosis.distributed import Wrapper, register_wrapper, unwrapped
        >>> class Timed(nn.Module):
        ...     def __init__(self, net):
        ...         super().__init__()
        ...         self.net = net
        >>> class TimedKind(Wrapper):
        ...     name = "Timed"
        ...     def matches(self, candidate):
        ...         return type(candidate).__name__ == "Timed"
        ...     def unwrap(self, wrapped):
        ...         return wrapped.net
        >>> register_wrapper(TimedKind())
        >>> unwrapped(Timed(nn.Linear(2, 3)))
        Linear(in_features=2, out_features=3, bias=True)
    """
    if not isinstance(kind, Wrapper) or not kind.name:
        raise ArgumentError(f"register_wrapper: {kind!r} is no instance of a class derived from Wrapper with a name.")
    if type(kind).matches is Wrapper.matches:
        raise ArgumentError(f"wrapper '{kind.name}' recognises nothing: override matches(), which every kind has to.")
    names = [known.name for known in _REGISTERED]
    if kind.name in names:
        raise ArgumentError(f"wrapper '{kind.name}' is there already; there are {', '.join(sorted(names))}.")
    _REGISTERED.insert(0, kind)


def kinds() -> tuple[Wrapper, ...]:
    """Return all kinds, those registered last first."""
    return tuple(_REGISTERED)


def kinds_in_place() -> tuple[Wrapper, ...]:
    """Return those kinds that change models in place."""
    return tuple(kind for kind in _REGISTERED if kind.in_place)


def kind_of(candidate: object) -> Wrapper:
    """Return the kind of wrapper that a module or optimizer is; for others one whose answers are the defaults."""
    return next((kind for kind in _REGISTERED if kind.matches(candidate)), _PLAIN)


def kind_of_tensor(tensor: object) -> Wrapper:
    """Return the kind of wrapper that has sharded a tensor; for others one whose answers are those of plain tensors."""
    return next((kind for kind in _REGISTERED if kind.is_sharded(tensor)), _PLAIN)


def is_named(candidate: object, name: str, package: str) -> bool:
    """Whether an object's class, or one that it derives from, has this name and comes from this package.

    Wrappers of other libraries are recognised so: nothing is imported that the user has not imported.
    """
    return any(c.__name__ == name and c.__module__.startswith(package) for c in type(candidate).__mro__)
