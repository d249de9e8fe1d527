"""One real forward pass, watched operator by operator.

Holds: running the model without leaving a trace in it, and the Tracer, which knows for every tensor of that pass
which channels it carries. Elsewhere: what an operator does to channels (graph.rules), what follows
(groups/build.py).

The pass is watched by a TorchDispatchMode that sends the ids along with the values, operator after operator. Recording
a graph first (make_fx) and walking it afterwards gives the same answer but costs seconds instead of milliseconds, and
the structure is measured again after every event. A tensor is known by its storage, offset, shape and strides, because
autograd may hand out another tensor object for the same view; this also makes in-place writes through views visible.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from apoptosis.errors import CaptureError, OutOfMemoryError, RankError
from apoptosis.graph.rules.norm_modules import NormWatch
from apoptosis.graph.rules.table import OPERATORS
from apoptosis.graph.trace.carried import Carried
from apoptosis.graph.trace.failures import failure
from apoptosis.graph.trace.fakes import Constants, over_fakes
from apoptosis.graph.trace.ids import named_tensors
from apoptosis.graph.trace.outputs import named_in, reached, tensors_in
from apoptosis.graph.trace.partial_ops import note_work
from apoptosis.graph.trace.result import TraceResult
from apoptosis.graph.trace.tracer import FRAME_MARKS, Tracer
from apoptosis.interrupts import hooks_on_all_modules, is_out_of_memory, restoring
from apoptosis.model.dispatch import DispatchMode
from apoptosis.model.passes import internal_passes
from apoptosis.modules.emptied import is_stand_in
from apoptosis.records import Seen


class _Watch(DispatchMode):
    """Hands every operator, once executed, to the tracer."""

    def __init__(self, tracer: Tracer, constants: Constants | None = None) -> None:
        super().__init__()
        self._tracer = tracer
        self._constants = constants

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # asks a fake tensor for its device
            return func(*args, **kwargs)
        seen = self._tracer.before(func, args)
        out = _operator(func, args, kwargs, self._constants)
        self._tracer.executed(func, seen, kwargs, out)
        return out


def _operator(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], constants: Constants | None) -> Any:
    return func(*args, **kwargs) if constants is None else constants.run(func, args, kwargs)


class _Functions(TorchFunctionMode):
    """Hands to the tracer, as one operator each, functions of torch that call other operators on other devices."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not functional.scaled_dot_product_attention or self._tracer.suspended:
            return func(*args, **(kwargs or {}))
        kwargs = dict(kwargs or {})
        args = (*args, *(kwargs.pop(name) for name in ("query", "key", "value")[len(args) :]))
        self._tracer.suspended = True
        try:
            out = func(*args, **kwargs)
            self._tracer.composite("scaled_dot_product_attention", args, kwargs, out)
        finally:
            self._tracer.suspended = False
        return out


def _forward(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return model(*args, **kwargs)


FRAME_MARKS.add(_forward.__code__)


@contextmanager
def _step_by_step(model: nn.Module) -> Iterator[None]:
    """Run recurrences and attention as plain operators: fused ones hide what happens to channels."""
    fast = torch.backends.mha.get_fastpath_enabled()
    # the setters themselves: flags() would set the precision of products, too, and warn of it
    fused = torch._C._get_mkldnn_enabled(), torch._C._get_cudnn_enabled()

    def undo() -> None:
        torch._C._set_mkldnn_enabled(fused[0])
        torch._C._set_cudnn_enabled(fused[1])
        torch.backends.mha.set_fastpath_enabled(fast)

    with restoring(undo):
        torch.backends.mha.set_fastpath_enabled(False)
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            torch._C._set_mkldnn_enabled(False)
            torch._C._set_cudnn_enabled(False)
        yield


@contextmanager
def _module_stack(tracer: Tracer, model: nn.Module) -> Iterator[None]:
    """Tell the tracer which module is running; calls in other threads are passed over."""
    thread = threading.get_ident()
    names = {id(module): name for name, module in model.named_modules()}
    norms = NormWatch(tracer)

    def enter(module: nn.Module, args: Any) -> None:
        if threading.get_ident() == thread:
            if tracer.calls is not None:
                tracer.calls.enter(module, tracer.trace.macs[tracer.mode])
            tracer.entered(module, args)
            norms.enter(module, args)
            if id(module) in names:
                tracer.trace.ran.add(names[id(module)])
                if is_stand_in(module) or all(arg.numel() for arg in args if isinstance(arg, Tensor)):
                    tracer.trace.fed.add(names[id(module)])

    def leave(module: nn.Module, args: Any, kwargs: Mapping[str, Any] | None, output: Any = None) -> None:
        if threading.get_ident() == thread:
            norms.leave(module, output)
            tracer.left(module, output)
            if tracer.calls is not None:
                tracer.calls.leave(module, args, kwargs or {}, output, tracer.trace.macs[tracer.mode])

    with hooks_on_all_modules(enter, leave):
        yield


def capture(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    trace: TraceResult,
    *,
    training: bool,
    carried: Carried,
    watch: Callable[[Seen], None] | None = None,
) -> int:
    """Run `model(*args, **kwargs)` once and add what it shows to `trace`; `watch` is handed what each site reads.

    carried: what the model keeps from earlier passes; in later rounds it has run as often before the pass is followed.

    Parameters, buffers, gradients, training flags, hooks and random generators are afterwards as they were. Hooks of
    the user's run as in any pass (`is_internal_forward` identifies them); what is compiled runs eagerly.

    Returns: the number of tensors that the model returned.

    Raises:
        CaptureError: the model's own forward pass fails on this input, or returns what cannot be looked into.
        OutOfMemoryError: memory ran out in it.
    """
    mode = "training" if training else "evaluation"
    drop = watch is None
    as_is = not drop and model.training == training
    with (
        internal_passes(model, training=training, drop=drop, as_is=as_is, seed=0, grad=watch is None),
        over_fakes(model) as constants,
        _step_by_step(model),
    ):
        carried.prepare(args, kwargs)
        tensors = {n: t for n, t in named_tensors(model)[0].items() if n in trace.channel_ids.tensors}
        tracer = Tracer(trace, model, tensors, tensors_in((args, kwargs)), OPERATORS, mode, watch, note_work)
        try:
            for _ in range(carried.rounds):
                _leave_behind(tracer, constants, model, args, kwargs)
            carried.begin(tracer)
            with _module_stack(tracer, model), _Functions(tracer), _Watch(tracer, constants):
                output = _forward(model, tuple(args), dict(kwargs))
        except (CaptureError, OutOfMemoryError, RankError):
            raise
        except Exception as error:  # the user's forward may raise anything
            if is_out_of_memory(error):
                raise OutOfMemoryError(str(failure(error, model, mode, _operator.__code__))) from error
            raise failure(error, model, mode, _operator.__code__) from error
        outputs = list(named_in(output))
        tracer.finished(outputs)
        leaves = reached(tensor for _, tensor in outputs) if training and watch is None else set[int]()
        trace.trained.update(name for name, tensor in tensors.items() if id(tensor) in leaves)
        carried.end(tracer)
        return len(outputs)


def _leave_behind(
    tracer: Tracer, constants: Constants | None, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """Run the model without following it, so that its attributes hold what a pass leaves there."""
    own_args, own_kwargs = tree_map_only(Tensor, Tensor.clone, (tuple(args), dict(kwargs)))
    tracer.suspended = True
    with _Watch(tracer, constants):
        _forward(model, own_args, own_kwargs)
    tracer.suspended = False
