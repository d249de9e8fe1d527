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
from apoptosis.graph.trace.findings import Norm, TraceResult
from apoptosis.graph.trace.tracer import Call, Tracer
from apoptosis.graph.trace.values import Value, drop_paths, nothing, varying
from apoptosis.modules.norms import is_shrunk, norm_strategy_of, response_of
from apoptosis.modules.response_norms import Response
from apoptosis.records import NormStrategy


@dataclass(frozen=True, slots=True)
class _Begun:
    """A norm as its forward begins; no operator is followed until it ends."""

    module: nn.Module
    x: Tensor
    value: Value
    way: NormStrategy
    layout: Response | None = None

    @property
    def axis(self) -> int:
        """The axis of the input that is normalised over."""
        return -1 if self.layout is None else self.layout.axis

    def ended(self, tracer: Tracer, output: Tensor) -> Value:
        """Return what is known of the norm's output: the channels of its input, scaled one by one."""
        call = Call(tracer, "layer_norm", type(self.module).__name__, "", (self.x,), {}, [output])
        if output.shape != self.x.shape:
            call.pin(self.value.ids, Code.NORM_SHAPE)
            return nothing(output.dim(), call.made())
        self._note(call, tracer.findings)
        gains: list[Tensor] = [p for p in self.module._parameters.values() if p is not None]
        if self.axis == 1:
            gains = [p.view(-1, 1, 1) if p.dim() == 1 else p for p in gains]
        met = tie_broadcast(call, gains, output.dim(), [(self.x, self.value)])
        return Value(met.ids, paths=drop_paths([self.value.paths]))

    def _note(self, call: Any, findings: TraceResult) -> None:
        ids, last = self.value.ids, self.axis % self.value.ids.ndim
        if last not in varying(ids):
            call.pin(ids, Code.NORM)  # one id all along, or none
            return
        gain = self.module._parameters.get("weight" if self.layout is None else self.layout.gain)
        view = None if gain is None else call.tracer.view(gain)
        slots = ids.reshape(-1)
        name = call.tracer.module_name
        known = findings.norms.get(name)
        if not findings.compensated and self.way != "response":
            call.pin(ids, Code.NORM, opt_in(self.module))
        elif varying(ids) != {last} or bool((slots == 0).any()):
            rows = varying(ids) > {last} and not bool((slots == 0).any())  # each normalised by itself
            call.pin(ids, Code.NORM_AXES, ROWS_REMEDY if rows else "", inner=rows)
        elif view is None or not view.whole:
            call.pin(ids, Code.NORM_WEIGHT)
        elif known is not None and not np.array_equal(known.slots, slots):
            call.pin(ids, Code.NORM_TWICE)
        else:
            dim = next((d for d, size in enumerate(view.owner.shape) if size > 1), 0)
            findings.norms[name] = Norm(name, slots, view.owner.name, self.way, dim, self.axis == 1)


class NormWatch:
    """Follows norms whose channels may go as one operator each; told of every module that begins or ends."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self._begun: _Begun | None = None

    def enter(self, module: nn.Module, args: Any) -> None:
        """Note that a module's forward begins; of a norm no operator is followed."""
        tracer = self._tracer
        if self._begun is not None or tracer.suspended or not args or not isinstance(args[0], Tensor):
            return
        own = tracer.findings.compensated or is_shrunk(module)
        if not (own or _may_respond(module)) or not (value := tracer.value(args[0])).has_channels:
            return
        tracer.suspended = True  # a norm that the model writes out is tried on numbers
        layout = response_of(module)
        way: NormStrategy = "response" if layout is not None else norm_strategy_of(module) if own else ""
        tracer.suspended = bool(way)
        if way:
            self._begun = _Begun(module, args[0], value, way, layout)

    def leave(self, module: nn.Module, output: Any) -> None:
        """Note that a module's forward ended."""
        begun = self._begun
        if begun is None or begun.module is not module:
            return
        self._begun, self._tracer.suspended = None, False
        if isinstance(output, Tensor):
            self._tracer.memory.put(output, begun.ended(self._tracer, output))


def _may_respond(module: nn.Module) -> bool:
    """Whether a module could compute a global response norm: a gain and a bias of its own, and no more."""
    return len(module._parameters) == 2 and not type(module).__module__.startswith("torch.") and not module._modules
