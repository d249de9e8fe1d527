"""One real forward pass, watched operator by operator.

Lives here: running the model without leaving a trace in it, and the Tracer, which knows for every tensor of that pass
which channels it carries. Does not live here: what an operator does to channels (rules*.py), what follows (groups.py).

The pass is watched by a TorchDispatchMode that sends the ids along with the values, operator after operator. Recording
a graph first (make_fx) and walking it afterwards gives the same answer but costs seconds instead of milliseconds, and
the structure is measured again after every event. A tensor is known by its storage, offset, shape and strides, because
autograd may hand out another tensor object for the same view; this also makes in-place writes through views visible.
"""

from __future__ import annotations

import random
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules import module as hooks
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from apoptosis.errors import CaptureError
from apoptosis.graph.findings import Findings
from apoptosis.graph.rules import RULES, SCALARS
from apoptosis.graph.slots import named_tensors
from apoptosis.graph.tracer import FRAME_MARKS, Tracer
from apoptosis.records import Seen


# torch leaves this class untyped in some releases and types it in others, hence the two ignores.
class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call, unused-ignore]
    """Hands every operator, once executed, to the tracer."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()  # type: ignore[no-untyped-call, unused-ignore]
        self._tracer = tracer

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        seen = self._tracer.before(func, args)
        out = func(*args, **kwargs)
        self._tracer.executed(func, seen, kwargs, out)
        return out


class _Functions(TorchFunctionMode):
    """Shows the tracer some functions of torch as one operator, whatever they come down to on this device."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()  # type: ignore[no-untyped-call, unused-ignore]
        self._tracer = tracer

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is not functional.scaled_dot_product_attention or self._tracer.muted:
            return func(*args, **kwargs)
        args = (*args, *(kwargs.pop(name) for name in ("query", "key", "value")[len(args) :]))
        self._tracer.muted = True
        try:
            out = func(*args, **kwargs)
            self._tracer.composite("scaled_dot_product_attention", args, kwargs, out)
        finally:
            self._tracer.muted = False
        return out


def _forward(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return model(*args, **kwargs)


FRAME_MARKS.add(_forward.__code__)


@contextmanager
def _flags(model: nn.Module, *, training: bool, drop: bool = True) -> Iterator[None]:
    """Set every module's training flag itself (train() may be overridden and do more), and restore each.

    drop: whether dropout modules take part in training mode.
    """
    before = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in before:
            module.training = training and (drop or not isinstance(module, _DropoutNd))
        yield
    finally:
        for module, flag in before:
            module.training = flag


@contextmanager
def _cloned_buffers(model: nn.Module) -> Iterator[None]:
    """Put clones in the place of all buffers, then the originals back."""
    clones: dict[int, Tensor] = {}
    before: list[tuple[nn.Module, dict[str, Tensor | None]]] = []
    try:
        for module in model.modules():
            if not module._buffers:
                continue
            before.append((module, dict(module._buffers)))
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    if id(buffer) not in clones:
                        clones[id(buffer)] = buffer.detach().clone()
                    module._buffers[name] = clones[id(buffer)]
        yield
    finally:
        for module, buffers in before:
            module._buffers.clear()
            module._buffers.update(buffers)


@contextmanager
def _kept_randomness(model: nn.Module) -> Iterator[None]:
    """Run under one fixed seed (the same structure on every rank) and leave every generator as it was."""
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)
            random.seed(0)
            np.random.seed(0)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def _eager() -> Iterator[None]:
    """Run compiled parts of the model eagerly; costs nothing where nothing was compiled."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using `torch.compile")  # about global hooks: ours, for this pass
        yield


@contextmanager
def _step_by_step(model: nn.Module) -> Iterator[None]:
    """Run recurrences and attention as plain operators instead of fused ones, which say nothing of their inside."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            with torch.backends.mkldnn.flags(enabled=False), torch.backends.cudnn.flags(enabled=False):
                yield
        else:
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def _module_stack(tracer: Tracer) -> Iterator[None]:
    """Tell the tracer which module is running; calls in other threads are passed over."""
    thread = threading.get_ident()

    def enter(module: nn.Module, args: Any) -> None:
        if threading.get_ident() == thread:
            tracer.entered(module, args)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() == thread:
            tracer.left(module, output)

    handles = [
        hooks.register_module_forward_pre_hook(enter),
        hooks.register_module_forward_hook(leave, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def tensors_in(obj: Any) -> Iterator[Tensor]:
    """Yield every tensor inside nested sequences, mappings, dataclasses and plain objects."""
    seen: set[int] = set()

    def walk(item: Any) -> Iterator[Tensor]:
        if isinstance(item, Tensor):
            yield item
            return
        if (
            item is None
            or isinstance(item, (str, bytes, int, float, complex, bool, type, nn.Module))
            or id(item) in seen
        ):
            return
        seen.add(id(item))
        parts: Sequence[Any]
        if isinstance(item, Mapping):
            parts = list(item.values())
        elif isinstance(item, (list, tuple, set, frozenset)):
            parts = list(item)
        elif is_dataclass(item) and not isinstance(item, type):
            parts = [getattr(item, f.name) for f in fields(item)]
        else:
            parts = list(vars(item).values()) if hasattr(item, "__dict__") else []
        for part in parts:
            yield from walk(part)

    yield from walk(obj)


def _message(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    hint = ""
    if "more than 1 value per channel" in text:
        hint = "; example_input needs at least two examples, BatchNorm cannot train on one"
    elif "shapes cannot be multiplied" in text or "expected input" in text.lower() or "size mismatch" in text:
        hint = "; example_input must have the shape the model trains on"
    return f"{type(error).__name__}: {text}{hint}"


def capture(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    findings: Findings,
    *,
    training: bool,
    watch: Callable[[Seen], None] | None = None,
) -> None:
    """Run `model(*args, **kwargs)` once and add what it shows to `findings`; `watch` is handed what each site reads.

    Parameters, buffers, gradients, training flags, hooks and random generators are afterwards as they were.

    Raises:
        CaptureError: the model's own forward pass fails on this input.
    """
    mode = "training" if training else "evaluation"
    with ExitStack() as stack:
        stack.enter_context(_flags(model, training=training, drop=watch is None))
        stack.enter_context(_cloned_buffers(model))
        stack.enter_context(_kept_randomness(model))
        stack.enter_context(_eager())
        tensors, _, _ = named_tensors(model)
        stack.enter_context(_step_by_step(model))
        tracer = Tracer(findings, model, tensors, tensors_in((args, kwargs)), RULES, mode, SCALARS, watch)
        torch.clear_autocast_cache()
        stack.callback(torch.clear_autocast_cache)
        stack.enter_context(_module_stack(tracer))
        stack.enter_context(torch.enable_grad() if watch is None else torch.no_grad())
        try:
            with _Functions(tracer), _Watch(tracer):
                output = _forward(model, tuple(args), dict(kwargs))
        except CaptureError:
            raise
        except Exception as error:  # the user's forward may raise anything
            raise CaptureError(
                f"{type(model).__name__} fails on example_input in {mode} mode: {_message(error)}"
            ) from error
        tracer.finished(list(tensors_in(output)))
