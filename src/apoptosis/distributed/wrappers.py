"""What a user's model is wrapped in: taken off where surgery reaches through it, refused by name where it does not.

Holds: compiled models, DistributedDataParallel and the buckets of its gradients, scripted and exported ones, the
older FSDP. Elsewhere: fully_shard (fsdp), the other checks of arguments.

Classes are known by name, so that nothing of torch is loaded that the user has not loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import nn
from torch.optim.swa_utils import AveragedModel

from apoptosis.errors import ArgumentError
from apoptosis.interrupts import restoring, uninterrupted

_BEHIND = "Give the module that it was made from."
_PER_EXAMPLE = (
    "gradients are taken example by example (Opacus, BackPACK), by hooks in backward that keep activations of the old "
    "widths"
)
_LATER = "Train without apoptosis, take the hooks off, and shrink_() the trained network."
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
    "AbstractGradSampleModule": ("opacus", _PER_EXAMPLE, f"{_LATER} (to_standard_module() gives it back.)"),
    "DeepSpeedEngine": (
        "deepspeed",
        "it keeps parameters and gradients in flat buffers, which no channel can be cut out of",
        "Shard with torch.distributed.fsdp.fully_shard, or train it with DistributedDataParallel.",
    ),
    "ScriptModule": ("torch.jit", "its shapes and its code are fixed (TorchScript)", _BEHIND),
    "_StatefulGraphModule": ("torch.export", "its shapes are written into an exported graph", _BEHIND),
    "UnflattenedModule": ("torch.export", "its shapes are written into an exported graph", _BEHIND),
}
# Buckets that DistributedDataParallel was set up with: until its first step torch tells nobody.
_BEGUN_WITH: WeakKeyDictionary[nn.Module, list[list[int]]] = WeakKeyDictionary()


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
    parallel, inner = parallel_in(model), unwrapped(model)
    for wrapper in parallel:
        _check_parallel(wrapper)
    for name, module in inner.named_modules():
        _check_refused(f"module '{name}'" if name else "the model", module)
        _check_per_example(f"module '{name}'" if name else "the model", module)
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


def unwrapped(model: nn.Module) -> nn.Module:
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


def rebuild(parallel: Any, layout: Mapping[str, Any] | None = None) -> None:
    """Let DistributedDataParallel set up its gradient buffers for the shapes that its module has now.

    They are set up again in the way of unpickling, the wrapper itself stays the same object and keeps its process
    group, and communication hooks are registered again with their state. All processes of the group call this.

    Args: layout: what `layout_of` told on as many ranks; gradients are summed in these buckets from the first step on,
    and so in the same order. One of other parameters or another number of ranks is left alone.

    Raises: ArgumentError: something would be lost.
    """
    _check_hooks(parallel)
    hooks = list(parallel._comm_hooks)
    with uninterrupted():
        try:
            _set_up(parallel, hooks, layout)
        except Exception:
            raise
        except BaseException:  # an interrupt: half of a wrapper would serve nobody
            _set_up(parallel, hooks, layout)
            raise


def _set_up(parallel: Any, hooks: list[tuple[Any, Any]], layout: Mapping[str, Any] | None) -> None:
    parallel._comm_hooks = []
    parallel.reducer = None  # the old one lets go of its hooks before the new one sets its own
    parallel.logger = None
    state = {name: value for name, value in vars(parallel).items() if name not in ("reducer", "logger")}
    with _begun_with(parallel, layout):
        parallel.__setstate__(state)  # takes the default process group, then what the state holds: the wrapper's own
    # A new reducer sums a static graph's first gradients at the end of backward, and is told to by this.
    parallel._static_graph_delay_allreduce_enqueued = False
    for hook, own in hooks:
        parallel.register_comm_hook(own, hook)


def layout_of(parallel: Any) -> dict[str, Any] | None:
    """Say in which buckets the next step sums gradients: {"ranks": int, "buckets": names of parameters per bucket}.

    DistributedDataParallel begins with one layout, and after its first step takes another, by the order in which rank
    0's gradients came. Sums of three and more ranks have other last digits in other buckets. Nothing is exchanged: ask
    on rank 0.

    Returns: None where the buckets follow from the shapes, or torch does not tell.
    """
    names, reported = _names(parallel), _told(parallel)
    if reported.get("num_parameter_tensors") != len(names):  # some were frozen since it was set up
        return None
    found = _BEGUN_WITH.get(parallel)
    if rebuilt := reported.get("rebuilt_per_bucket_param_indices"):
        found = [_numbers(bucket, " ") for bucket in rebuilt.split(",")]
    elif reported.get("iteration", 0) > 1 if parallel.static_graph else not parallel.find_unused_parameters:
        # a static graph's first gradients are summed in the order of the parameters, and count for nothing
        found = _to_come(parallel, _numbers(reported.get("prev_iteration_grad_ready_order_indices", ""), ",")) or found
    if found is None:
        return None
    return {"ranks": parallel.process_group.size(), "buckets": [[names[i] for i in bucket] for bucket in found]}


def read_layouts(layouts: Any) -> list[dict[str, Any] | None]:
    """Read what `layout_of` told of several wrappers, as a checkpoint holds it.

    Raises: KeyError, TypeError, ValueError: it is damaged; the caller words it.
    """
    return [
        None
        if one is None
        else {"ranks": int(one["ranks"]), "buckets": [list(map(str, part)) for part in one["buckets"]]}
        for one in layouts
    ]


def _told(parallel: Any) -> dict[str, Any]:
    """Return what torch tells of the gradient buffers; of a step it does when the next one begins, or is asked for."""
    if parallel.logger is None:
        return {}
    reported: dict[str, Any] = parallel._get_ddp_logging_data()
    if not reported.get("has_rebuilt_buckets"):
        parallel.logger.set_runtime_stats_and_log()
        reported = parallel._get_ddp_logging_data()
    return reported


def _to_come(parallel: Any, order: list[int]) -> list[list[int]] | None:
    """Return the buckets that will be made of the order in which one step's gradients came, None for no such step."""
    parameters, sparse = parallel._build_params_for_reducer()
    config = getattr(parallel, "_bucket_config", None)  # older releases of torch have none
    if config is None or sorted(order) != list(range(len(parameters))):
        return None
    import torch.distributed

    dist: Any = torch.distributed
    asked = {"static_graph": parallel.static_graph, "find_unused_parameters": parallel.find_unused_parameters}
    limits = config.compute_bucket_size_limits(**asked)[1]
    limits = limits or [config.first_bucket_bytes_cap, config.bucket_bytes_cap]
    found: list[list[int]] = dist._compute_bucket_assignment_by_size(
        [parameters[i] for i in order], limits, sparse, order
    )[0]
    return found


@contextmanager
def _begun_with(parallel: Any, layout: Mapping[str, Any] | None) -> Iterator[None]:
    """Let gradient buffers that are set up inside begin with a layout that fits them.

    torch asks a function of its own for the first buckets, and no argument says others: meanwhile it is another
    function, which answers for these very parameters.
    """
    _BEGUN_WITH.pop(parallel, None)
    buckets = None if layout is None else _fitting(parallel, layout)
    if buckets is None:
        yield
        return
    import torch.distributed

    dist: Any = torch.distributed
    own = [id(parameter) for parameter in parallel._build_params_for_reducer()[0]]
    plain = dist._compute_bucket_assignment_by_size

    def stored(tensors: Any, *args: Any, **kwargs: Any) -> tuple[list[list[int]], list[int]]:
        found: tuple[list[list[int]], list[int]] = plain(tensors, *args, **kwargs)
        if [id(tensor) for tensor in tensors] != own:
            return found
        return buckets[::-1], [max(found[1])] * len(buckets)  # the caller puts the last one first

    with restoring(lambda: setattr(dist, "_compute_bucket_assignment_by_size", plain)):
        dist._compute_bucket_assignment_by_size = stored
        yield
    _BEGUN_WITH[parallel] = buckets


def _fitting(parallel: Any, layout: Mapping[str, Any]) -> list[list[int]] | None:
    """Return the buckets by the places of their parameters, None if they are of others, or of other ranks."""
    places = {name: place for place, name in enumerate(_names(parallel))}
    found = [[places.get(name, -1) for name in bucket] for bucket in layout["buckets"]]
    if layout["ranks"] != parallel.process_group.size() or not all(found):
        return None
    if sorted(place for bucket in found for place in bucket) != list(range(len(places))):
        return None
    own = parallel._build_params_for_reducer()[0]
    kinds = ({(own[place].dtype, own[place].device) for place in bucket} for bucket in found)
    return found if all(len(each) == 1 for each in kinds) else None


def _names(parallel: Any) -> list[str]:
    """Return the names of the parameters whose gradients are summed, in the order of the reducer's numbers."""
    known = {id(parameter): name for name, parameter in unwrapped(parallel).named_parameters()}
    return [known[id(parameter)] for parameter in parallel._build_params_for_reducer()[0]]


def _numbers(text: str, separator: str) -> list[int]:
    return [int(number) for number in text.split(separator) if number.strip()]


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
    """Refuse what the gradient buffers cannot be set up again for."""
    if module.device_type == "cpu" and any(isinstance(m, nn.SyncBatchNorm) for m in module.modules()):
        raise ArgumentError(
            "the model has nn.SyncBatchNorm in DistributedDataParallel on the CPU, for which torch sets up no gradient "
            "buffers: it synchronises on GPUs alone. Use nn.BatchNorm2d (1d, 3d)."
        )
    _check_hooks(module)


def _check_hooks(module: Any) -> None:
    for _, state in module._comm_hooks:
        if hasattr(state, "error_dict"):
            raise ArgumentError(
                "the model is wrapped in DistributedDataParallel with a communication hook whose state keeps tensors "
                "of the old buckets (PowerSGD). Use a hook without memory, such as fp16_compress_hook."
            )
    reported = module._get_ddp_logging_data().get("comm_hook", "") if module.logger is not None else ""
    known = {hook.__qualname__ for hook, _ in module._comm_hooks}
    if (reported and reported not in known) or getattr(module, "mixed_precision", None) is not None:
        raise ArgumentError(
            "the model is wrapped in DistributedDataParallel with mixed_precision= or a built-in communication hook, "
            "which would be lost when its buffers are set up for new shapes. Wrap it without, or register the hook of "
            "torch.distributed.algorithms.ddp_comm_hooks that does the same."
        )


def _check_refused(who: str, module: nn.Module) -> None:
    for name, (package, why, remedy) in _REFUSED.items():
        if _is(module, name, package):
            shown = type(module).__name__ if name.startswith("Abstract") else name
            raise ArgumentError(f"{who} is a {shown}: {why}. {remedy}")


def _check_per_example(who: str, module: nn.Module) -> None:
    """Refuse hooks that compute gradients of single examples; they need no wrapper around the model."""
    hooks = (*module._forward_hooks.values(), *module._backward_hooks.values())
    hooked = any(str(getattr(hook, "__module__", "")).startswith(("opacus.", "backpack.")) for hook in hooks)
    marked = any(p is not None and hasattr(p, "grad_sample") for p in module._parameters.values())
    if hooked or marked or "autograd_grad_sample_hooks" in vars(module):
        raise ArgumentError(f"{who}: {_PER_EXAMPLE}. {_LATER}")
