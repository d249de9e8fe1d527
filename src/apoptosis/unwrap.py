"""What a user's model is wrapped in: taken off where surgery reaches through it, refused by name where it does not.

Lives here: compiled models, DistributedDataParallel, scripted and exported ones, the older FSDP. Does not live here:
fully_shard (sharded), the other checks of arguments.

Classes are known by name, so that nothing of torch is loaded that the user has not loaded.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn
from torch.optim.swa_utils import AveragedModel

from apoptosis.errors import ArgumentError

_BEHIND = "Give the module that it was made from."
# class name -> (where it is defined, what it does, what to do)
_REFUSED: dict[str, tuple[str, str, str]] = {
    "FullyShardedDataParallel": (
        "torch.distributed",
        "each process holds a shard of every unit's parameters as one flat tensor, which no channel can be cut out of",
        "Shard with torch.distributed.fsdp.fully_shard, or train it with DistributedDataParallel.",
    ),
    "DataParallel": (
        "torch.nn",
        "it copies the module to every device at each pass, and a window sees only copies",
        "Give its .module and train that on one device.",
    ),
    "ScriptModule": ("torch.jit", "its shapes and its code are fixed (TorchScript)", _BEHIND),
    "_StatefulGraphModule": ("torch.export", "its shapes are written into an exported graph", _BEHIND),
    "UnflattenedModule": ("torch.export", "its shapes are written into an exported graph", _BEHIND),
}


class Unwrapped(NamedTuple):
    """A model without its wrappers. parallel: the DistributedDataParallel modules around it, outermost first."""

    model: nn.Module
    parallel: tuple[nn.Module, ...] = ()


def unwrap(model: nn.Module) -> Unwrapped:
    """Take off torch.compile and DistributedDataParallel in any order.

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
    parallel, inner = parallel_in(model), bare(model)
    for wrapper in parallel:
        _check_parallel(wrapper)
    for name, module in inner.named_modules():
        _check_refused(f"module '{name}'" if name else "the model", module)
        if name and _is(module, "DistributedDataParallel", "torch.nn"):
            raise ArgumentError(
                f"module '{name}' is wrapped in DistributedDataParallel by itself, and would keep gradient buffers of "
                "the old shapes. Wrap the whole model, or give apoptosis the wrapped module alone."
            )
    return Unwrapped(model=inner, parallel=parallel)


def check_alone(unwrapped: Unwrapped) -> Unwrapped:
    """Refuse models of several processes where one process acts alone; return what was given.

    Raises: ArgumentError: there are several.
    """
    if any(type(parameter).__name__ == "DTensor" for parameter in unwrapped.model.parameters()):
        raise ArgumentError(
            "the model is spread over several processes (fully_shard), in which every one would have to remove the "
            "same channels. Shrink the trained network in one process before it is sharded, or let Apoptosis shrink it "
            "while it trains."
        )
    parallel: Any = unwrapped.parallel
    ranks = parallel[0].process_group.size() if parallel else 1
    if ranks > 1:
        raise ArgumentError(
            f"the model is wrapped in DistributedDataParallel over {ranks} processes, in which every one would have to "
            "remove the same channels. Shrink the trained network with shrink_(model.module, ...) in one process and "
            "wrap it again, or let Apoptosis shrink it while it trains."
        )
    return unwrapped


def bare(model: nn.Module) -> nn.Module:
    """Return a model, or the wrapped model that an averaged copy holds, without its wrappers, whatever they are."""
    if isinstance(model, AveragedModel) and _inside(model.module) is not None:
        model = model.module
    while (wrapped := _inside(model)) is not None:
        model = wrapped
    return model


def parallel_in(model: nn.Module) -> tuple[nn.Module, ...]:
    """Return the DistributedDataParallel modules around a model, outermost first."""
    found = []
    inner: nn.Module | None = model
    while inner is not None:
        if _is(inner, "DistributedDataParallel", "torch.nn"):
            found.append(inner)
        inner = _inside(inner)
    return tuple(found)


def rebuild(parallel: Any) -> None:
    """Let DistributedDataParallel set up its gradient buffers for the shapes that its module has now.

    They are set up again in the way of unpickling, the wrapper itself stays the same object, and communication hooks
    are registered again with their state. With several processes all of them call this.

    Raises: ArgumentError: something would be lost.
    """
    _check_hooks(parallel)
    state = parallel.__getstate__()
    hooks, parallel._comm_hooks = parallel._comm_hooks, []
    parallel.reducer = None  # the old one lets go of its hooks before the new one sets its own
    parallel.logger = None
    parallel.__setstate__(state | {"_comm_hooks": parallel._comm_hooks})
    # A new reducer sums a static graph's first gradients at the end of backward, and is told to by this.
    parallel._static_graph_delay_allreduce_enqueued = False
    for hook, own in hooks:
        parallel.register_comm_hook(own, hook)


def _inside(module: nn.Module) -> nn.Module | None:
    """Return what a compiled or data-parallel module is made from, None for others."""
    found = None
    if _is(module, "OptimizedModule", "torch._dynamo"):
        found = module._modules.get("_orig_mod")
    elif _is(module, "DistributedDataParallel", "torch.nn"):
        found = module._modules.get("module")
    return found


def _is(module: nn.Module, name: str, package: str) -> bool:
    return any(c.__name__ == name and c.__module__.startswith(package) for c in type(module).__mro__)


def _check_parallel(module: Any) -> None:
    """Refuse what the gradient buffers cannot be set up again for, and what makes captures wait for other processes."""
    if module.process_group.size() > 1 and any(isinstance(m, nn.SyncBatchNorm) for m in module.modules()):
        raise ArgumentError(
            "the model has nn.SyncBatchNorm in DistributedDataParallel of several processes: its passes wait for one "
            "another, and the captures of an event would, too. Use nn.BatchNorm2d (1d, 3d), or train in one process."
        )
    _check_hooks(module)
    try:
        module.__getstate__()  # what rebuild() begins with
    except RuntimeError as error:
        raise ArgumentError(
            f"the model is wrapped in DistributedDataParallel whose buffers cannot be set up for new shapes: {error}. "
            "Wrap it with the default process group."
        ) from error


def _check_hooks(module: Any) -> None:
    for _, state in module._comm_hooks:
        if hasattr(state, "error_dict"):
            raise ArgumentError(
                "the model is wrapped in DistributedDataParallel with a communication hook whose state keeps tensors "
                "of the old buckets (PowerSGD). Use a hook without memory, such as fp16_compress_hook."
            )
    told = module._get_ddp_logging_data().get("comm_hook", "") if module.logger is not None else ""
    known = {hook.__qualname__ for hook, _ in module._comm_hooks}
    if (told and told not in known) or getattr(module, "mixed_precision", None) is not None:
        raise ArgumentError(
            "the model is wrapped in DistributedDataParallel with mixed_precision= or a built-in communication hook, "
            "which would be lost when its buffers are set up for new shapes. Wrap it without, or register the hook of "
            "torch.distributed.algorithms.ddp_comm_hooks that does the same."
        )


def _check_refused(who: str, module: nn.Module) -> None:
    for name, (package, why, remedy) in _REFUSED.items():
        if _is(module, name, package):
            raise ArgumentError(f"{who} is a {name}: {why}. {remedy}")
