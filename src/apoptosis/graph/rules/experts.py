"""Grouped matrix products: rows of one operand, each with its own matrix of a stack of experts.

Holds: the operator that mixtures of experts come down to, and matrices picked from a stack for every token.
Elsewhere: an expert at a time, or all of them at once, which is a product with one slice or all of the stack
(rules/contraction.py); the router, whose channels pin.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from apoptosis.graph.explain import Code
from apoptosis.graph.rules.contraction import consume, register
from apoptosis.graph.rules.matrices import Matrix
from apoptosis.graph.trace.operators import Result
from apoptosis.graph.trace.result import Consumer, site_key
from apoptosis.graph.trace.tracer import Call
from apoptosis.graph.trace.values import Value


def grouped_mm(call: Call) -> Result:
    """(rows, in) times one of (experts, in, out) per row: the same positions of all experts are one channel."""
    x, w = call.args[0], call.args[1]
    tracer = call.tracer
    macs = float(call.outs[0].numel()) * x.shape[-1]
    tracer.trace.macs[tracer.mode] += macs
    view = tracer.view(w)
    if view is None or tracer.view(x) is not None or (x.dim(), w.dim()) != (2, 3):
        call.pin_all(Code.NO_STACK)
        return None
    columns, rows = view.sole(1), view.sole(2)
    if columns is None or rows is None:
        call.pin_all(Code.OTHER_STACK)
        return None
    dims = {axis: next(dim for dim in view.varied() if axis in view.axes(dim)) for axis in (1, 2)}
    weight = Matrix(view.info, dims[1], dims[2], columns, rows)
    for dim in set(view.varied()) - set(dims.values()):
        call.pin(view.ids(dim), Code.EXPERT_NUMBERS)
    value = consume(call, weight, x, 1, columns)
    site = Consumer(tracer.module_name, "linear", view.info.name, dims[1], None, functional=True)
    register(call, weight, value, site, False, macs)
    tracer.show(site_key(site), lambda: (x, None))
    made = (view.info.name, dims[2])
    return Value(np.asarray(rows)[None, :], paths={made: None}, linear=frozenset((made,)))


def of_stack(call: Call, tensor: Tensor, indices: Sequence[Tensor | None]) -> bool:
    """Whether matrices are picked from a stack of experts, one for every token: they stand for the stack."""
    picks = [index for index in indices if index is not None]
    if len(picks) != 1 or indices[0] is None or picks[0].dim() != 1 or picks[0].dtype in (torch.bool, torch.uint8):
        return False
    return call.tracer.memory.look_up(call.outs[0], tensor)
