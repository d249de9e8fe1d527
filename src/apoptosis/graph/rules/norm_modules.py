"""Modules that are followed as one norm, whatever operators they run, where channels under norms may go.

Holds: what a forward pass shows of them. Elsewhere: which modules these are and what becomes of them
(modules.norms), the sites that they become (groups.norms), the rules of the operators that other norms are made of.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from apoptosis.graph.explain import ROWS_REMEDY, Code, opt_in
from apoptosis.graph.rules.broadcast import tie_broadcast
from apoptosis.graph.trace.result import Norm, TraceResult
from apoptosis.graph.trace.tracer import Call, Tracer
from apoptosis.graph.trace.values import Value, drop_paths, nothing, varying
from apoptosis.modules.norms import is_shrunk, norm_strategy_of, response_of
from apoptosis.modules.response_norms import Response
from apoptosis.records import NormStrategy


@dataclass(frozen=True, slots=True)
class _RunningNorm:
    """A norm while its forward runs; none of its operators is followed."""

    module: nn.Module
    x: Tensor
    value: Value
    strategy: NormStrategy
    layout: Response | None = None

    @property
    def axis(self) -> int:
        """The axis of the input that is normalised over."""
        return -1 if self.layout is None else self.layout.axis

    def on_exit(self, tracer: Tracer, output: Tensor) -> Value:
        """Return what is known of the norm's output: the channels of its input, scaled one by one."""
        call = Call(tracer, "layer_norm", type(self.module).__name__, "", (self.x,), {}, [output])
        if output.shape != self.x.shape:
            call.pin(self.value.ids, Code.NORM_SHAPE)
            return nothing(output.dim(), call.origin())
        self._note(call, tracer.trace)
        gains: list[Tensor] = [p for p in self.module._parameters.values() if p is not None]
        if self.axis == 1:
            gains = [p.view(-1, 1, 1) if p.dim() == 1 else p for p in gains]
        met = tie_broadcast(call, gains, output.dim(), [(self.x, self.value)])
        return Value(met.ids, paths=drop_paths([self.value.paths]))

    def _note(self, call: Any, trace: TraceResult) -> None:
        ids, last = self.value.ids, self.axis % self.value.ids.ndim
        if last not in varying(ids):
            call.pin(ids, Code.NORM)  # one id all along, or none
            return
        gain = self.module._parameters.get("weight" if self.layout is None else self.layout.gain)
        view = None if gain is None else call.view(gain)
        channel_ids = ids.reshape(-1)
        name = call.tracer.module_name
        known = trace.norms.get(name)
        if not trace.compensated and self.strategy != "response":
            call.pin(ids, Code.NORM, opt_in(self.module))
        elif varying(ids) != {last} or bool((channel_ids == 0).any()):
            rows = varying(ids) > {last} and not bool((channel_ids == 0).any())  # each normalised by itself
            call.pin(ids, Code.NORM_AXES, ROWS_REMEDY if rows else "", inner=rows)
        elif view is None or not view.whole:
            call.pin(ids, Code.NORM_WEIGHT)
        elif known is not None and not np.array_equal(known.ids, channel_ids):
            call.pin(ids, Code.NORM_TWICE)
        else:
            dim = next((d for d, size in enumerate(view.info.shape) if size > 1), 0)
            trace.norms[name] = Norm(name, channel_ids, view.info.name, self.strategy, dim, self.axis == 1)


class NormWatch:
    """Follows norms whose channels may go as one operator each; called when a module's forward begins and ends."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self._running_module: _RunningNorm | None = None

    def enter(self, module: nn.Module, args: Any) -> None:
        """Note that a module's forward begins; of a norm no operator is followed."""
        tracer = self._tracer
        if self._running_module is not None or tracer.suspended or not args or not isinstance(args[0], Tensor):
            return
        own = tracer.trace.compensated or is_shrunk(module)
        if not (own or _may_respond(module)) or not (value := tracer.value(args[0])).has_channels:
            return
        tracer.suspended = True  # a norm that the model writes out is tried on numbers
        layout = response_of(module)
        strategy: NormStrategy = "response" if layout is not None else norm_strategy_of(module) if own else ""
        tracer.suspended = bool(strategy)
        if strategy:
            self._running_module = _RunningNorm(module, args[0], value, strategy, layout)

    def leave(self, module: nn.Module, output: Any) -> None:
        """Note that a module's forward ended."""
        running_module = self._running_module
        if running_module is None or running_module.module is not module:
            return
        self._running_module, self._tracer.suspended = None, False
        if isinstance(output, Tensor):
            self._tracer.memory.put(output, running_module.on_exit(self._tracer, output))


def _may_respond(module: nn.Module) -> bool:
    """Whether a module could compute a global response norm: a gain and a bias of its own, and no more."""
    return len(module._parameters) == 2 and not type(module).__module__.startswith("torch.") and not module._modules
