"""DistributedDataParallel: gradient buckets set up again for new shapes, and laid out as a checkpoint says.

Holds: the wrapper's kind, and `rebuild_ddp` for shapes that were changed by other means than `Apoptosis` and `load`,
which call it by themselves. Elsewhere: how ranks talk (ranks.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed
from torch import nn

from apoptosis.distributed.protocol import Layout, Wrapper, is_named, kind_of, register_wrapper
from apoptosis.distributed.ranks import Ranks
from apoptosis.distributed.wrappers import unwrap, unwrapped
from apoptosis.errors import ArgumentError
from apoptosis.interrupts import restoring, uninterrupted

_DIST: Any = torch.distributed
# Buckets that DistributedDataParallel was set up with: torch does not report them before its first step.
_FIRST_BUCKETS: WeakKeyDictionary[nn.Module, list[list[int]]] = WeakKeyDictionary()


def rebuild_ddp(model: nn.Module) -> None:
    """Let DistributedDataParallel set up its gradient buffers for the shapes that its module has now, in place.

    The wrapper stays the same object, so that the user's variable, and a Join context or hooks that hold it, stay
    valid; communication hooks are registered again with their state. Call it on every rank of its group, between an
    optimizer step and the next forward pass; nothing is exchanged.

    Args: model: DistributedDataParallel, also under or over torch.compile.

    Raises: ArgumentError: the model has no such wrapper, or one with something that would be lost (built-in
    communication hooks, PowerSGD's state). Nothing has changed then.

    Example:
        >>> import tempfile, torch, torch.distributed as dist
        >>> from torch.nn.parallel import DistributedDataParallel
        >>> net = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store = dist.FileStore(f"{folder}/store", 1)
        ...     dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        ...     model = DistributedDataParallel(net)
        ...     net[0], net[2] = nn.Linear(2, 3), nn.Linear(3, 1)
        ...     rebuild_ddp(model)
        ...     model(torch.ones(4, 2)).sum().backward()
        ...     dist.destroy_process_group()
        >>> net[2].weight.grad.shape
        torch.Size([1, 3])
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"rebuild_ddp: model is a {type(model).__name__}, not a torch.nn.Module.")
    wrappers = [wrapper for wrapper in unwrap(model).wrappers if kind_of(wrapper) is _KIND]
    if not wrappers:
        raise ArgumentError(f"rebuild_ddp: {type(model).__name__} is not in DistributedDataParallel; give the wrapper.")
    for wrapper in wrappers:
        _KIND.rebuild(wrapper)


class _DataParallel(Wrapper):
    """DistributedDataParallel around a model."""

    name = "DistributedDataParallel"

    def matches(self, candidate: object) -> bool:
        return is_named(candidate, "DistributedDataParallel", "torch.nn")

    def unwrap(self, wrapped: Any) -> Any:
        return wrapped._modules.get("module")

    def check(self, wrapped: Any, name: str) -> None:
        super().check(wrapped, name)
        if wrapped.device_type == "cpu" and any(isinstance(m, nn.SyncBatchNorm) for m in wrapped.modules()):
            raise ArgumentError(
                "the model has nn.SyncBatchNorm in DistributedDataParallel on the CPU, for which torch sets up no "
                "gradient buffers: it synchronises on GPUs alone. Use nn.BatchNorm2d (1d, 3d)."
            )
        _check_hooks(wrapped)

    def check_step(self, wrapped: Any) -> None:
        join = wrapped._join_config
        if join.enable and not join.throw_on_early_termination:
            raise ArgumentError(
                "step() is called inside torch.distributed.algorithms.join.Join: a rank that is out of batches "
                "answers gradient sums there, takes no part in an event, and its answers would be taken for votes. "
                "Give every rank the same number of steps, or Join(..., throw_on_early_termination=True)."
            )

    def group(self, wrapped: Any) -> Any:
        return wrapped.process_group

    def ranks(self, wrapped: Any) -> Ranks | None:
        for _, state in wrapped._comm_hooks:  # a hook whose state are ranks (of MPI, say) sums gradients by them
            if isinstance(state, Ranks):
                size = wrapped.process_group.size()
                if state.size != size:
                    raise ArgumentError(
                        f"DistributedDataParallel is over {size} processes, and its communication hook sums over "
                        f"{state.size}: gradients of other networks would be mixed in. Give both the same processes."
                    )
                return state
        return None

    def rebuild(self, wrapped: Any, layout: Layout | None = None) -> None:
        """Set up the gradient buckets for the shapes that its module has now.

        They are set up again in the way of unpickling: the wrapper stays the same object and keeps its process group,
        and communication hooks are registered again with their state. All processes of the group call this.

        Args: layout: gradients are summed in these buckets from the first step on, and so in the same order. One of
        other parameters or another number of ranks is left alone.

        Raises: ArgumentError: something would be lost.
        """
        _check_hooks(wrapped)
        hooks = list(wrapped._comm_hooks)
        with uninterrupted():
            try:
                _set_up(wrapped, hooks, layout)
            except Exception:
                raise
            except BaseException:  # an interrupt: half of a wrapper would be of no use
                _set_up(wrapped, hooks, layout)
                raise

    def layout(self, wrapped: Any) -> Layout | None:
        """Say in which buckets the next step sums gradients: {"ranks": int, "buckets": parameter names per bucket}.

        DistributedDataParallel begins with one layout, and after its first step takes another, by the order in which
        rank 0's gradients came. Sums of three and more ranks have other last digits in other buckets. Nothing is
        exchanged: ask on rank 0.

        Returns: None where the buckets follow from the shapes, or torch does not report them.
        """
        names, reported = _names(wrapped), _reported(wrapped)
        if reported.get("num_parameter_tensors") != len(names):  # some were frozen since it was set up
            return None
        found = _FIRST_BUCKETS.get(wrapped)
        if rebuilt := reported.get("rebuilt_per_bucket_param_indices"):
            found = [_numbers(bucket, " ") for bucket in rebuilt.split(",")]
        elif reported.get("iteration", 0) > 1 if wrapped.static_graph else not wrapped.find_unused_parameters:
            # a static graph's first gradients are summed in the order of the parameters, and count for nothing
            order = _numbers(reported.get("prev_iteration_grad_ready_order_indices", ""), ",")
            found = _next_buckets(wrapped, order) or found
        if found is None:
            return None
        return {"ranks": wrapped.process_group.size(), "buckets": [[names[i] for i in bucket] for bucket in found]}

    def read_layout(self, stored: Any) -> Layout:
        return {"ranks": int(stored["ranks"]), "buckets": [list(map(str, bucket)) for bucket in stored["buckets"]]}


def _set_up(parallel: Any, hooks: list[tuple[Any, Any]], layout: Layout | None) -> None:
    parallel._comm_hooks = []
    parallel.reducer = None  # the old one lets go of its hooks before the new one sets its own
    parallel.logger = None
    state = {name: value for name, value in vars(parallel).items() if name not in ("reducer", "logger")}
    with _first_buckets(parallel, layout):
        parallel.__setstate__(state)  # takes the default process group, then what the state holds: the wrapper's own
    # A new reducer sums a static graph's first gradients at the end of backward, which this asks for.
    parallel._static_graph_delay_allreduce_enqueued = False
    for hook, own in hooks:
        parallel.register_comm_hook(own, hook)


def _reported(parallel: Any) -> dict[str, Any]:
    """Return torch's report on the gradient buckets; it knows of a step once the next one begins, or it is asked to."""
    if parallel.logger is None:
        return {}
    reported: dict[str, Any] = parallel._get_ddp_logging_data()
    if not reported.get("has_rebuilt_buckets"):
        parallel.logger.set_runtime_stats_and_log()
        reported = parallel._get_ddp_logging_data()
    return reported


def _next_buckets(parallel: Any, order: list[int]) -> list[list[int]] | None:
    """Return the buckets that torch will build from the order in which one step's gradients came; None if unknown."""
    parameters, sparse = parallel._build_params_for_reducer()
    config = getattr(parallel, "_bucket_config", None)  # older releases of torch have none
    if config is None or sorted(order) != list(range(len(parameters))):
        return None
    asked = {"static_graph": parallel.static_graph, "find_unused_parameters": parallel.find_unused_parameters}
    limits = config.compute_bucket_size_limits(**asked)[1]
    limits = limits or [config.first_bucket_bytes_cap, config.bucket_bytes_cap]
    found: list[list[int]] = _DIST._compute_bucket_assignment_by_size(
        [parameters[i] for i in order], limits, sparse, order
    )[0]
    return found


@contextmanager
def _first_buckets(parallel: Any, layout: Layout | None) -> Iterator[None]:
    """Let gradient buckets that are set up inside begin with a stored layout, if it fits.

    torch computes the first buckets by a function of its own and takes no argument for them: that function is replaced
    meanwhile, for exactly these parameters.
    """
    _FIRST_BUCKETS.pop(parallel, None)
    buckets = None if layout is None else _fitting(parallel, layout)
    if buckets is None:
        yield
        return
    own = [id(parameter) for parameter in parallel._build_params_for_reducer()[0]]
    plain = _DIST._compute_bucket_assignment_by_size

    def stored(tensors: Any, *args: Any, **kwargs: Any) -> tuple[list[list[int]], list[int]]:
        found: tuple[list[list[int]], list[int]] = plain(tensors, *args, **kwargs)
        if [id(tensor) for tensor in tensors] != own:
            return found
        return buckets[::-1], [max(found[1])] * len(buckets)  # the caller puts the last one first

    with restoring(lambda: setattr(_DIST, "_compute_bucket_assignment_by_size", plain)):
        _DIST._compute_bucket_assignment_by_size = stored
        yield
    _FIRST_BUCKETS[parallel] = buckets


def _fitting(parallel: Any, layout: Layout) -> list[list[int]] | None:
    """Return the buckets as indices of parameters; None if they are of other parameters or another number of ranks."""
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


_KIND = _DataParallel()
register_wrapper(_KIND)
