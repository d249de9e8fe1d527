"""Convolutions: of layers, and called as functions on any parameter.

Holds: full, grouped, depthwise and transposed convolutions as consumer sites and producers. Elsewhere:
what contractions have in common (rules/contraction.py), weights that are computed first (rules/normalization.py).

A stock layer's input is seen by a hook, and so is that of any module whose forward convolves its first argument, padded
or not; what else is convolved is seen by running the pass again.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.conv import _ConvNd

from apoptosis.graph.explain import Code
from apoptosis.graph.rules.computed_weights import normal_of
from apoptosis.graph.rules.contraction import biased, consume, factors_of, register, site_bias
from apoptosis.graph.rules.matrices import Matrix, as_kernel
from apoptosis.graph.trace.ids import View
from apoptosis.graph.trace.operators import Result
from apoptosis.graph.trace.result import Consumer, site_key
from apoptosis.graph.trace.tracer import Call
from apoptosis.graph.trace.values import Path, Value, drop_paths, nothing, varying
from apoptosis.records import Convolution, IntArray, SiteKind

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_STOCK: dict[Any, Any] = {cls.forward: getattr(cls, "_conv_forward", None) for cls in _CONVS}


def _stock_conv(module: nn.Module | None) -> bool:
    if not isinstance(module, _ConvNd) or "forward" in vars(module):
        return False
    forward = type(module).forward
    return forward in _STOCK and getattr(type(module), "_conv_forward", None) is _STOCK[forward]


def convolution(call: Call) -> Result:
    """Convolve with a parameter or with anything else."""
    x, w, bias = call.args[0], call.args[1], call.arg(2, "bias")
    transposed, groups = bool(call.arg(6, "transposed")), int(call.arg(8, "groups"))
    tracer, out = call.tracer, call.outs[0]
    macs = float(x.numel() if transposed else out.numel()) * w.shape[1] * math.prod(w.shape[2:])
    tracer.trace.macs[tracer.mode] += macs
    along = varying(tracer.value(x).ids)
    sliding = tracer.view(x) is None and len(along - {0}) == 1 and 1 not in along  # several axes: shuffled pixels
    if sliding and w.shape[:2] == (1, 1) and math.prod(w.shape[2:]) > 1:
        return _slides_over_channels(call, x, w)
    single = groups > 1 and (w.shape[0] // groups if transposed else w.shape[1]) == 1
    view = tracer.view(w)
    axes = None if view is None else as_kernel(view)
    if view is not None and single and axes is not None and axes[0] >= 0:
        value = _depthwise(call, view, axes[0], x, groups, transposed, macs)
    elif view is not None and axes is not None and min(axes[:2]) >= 0 and not view.info.is_buffer:
        value = _with_parameter(call, w, view, axes, x, macs)
    elif single and w.shape[0] == groups and _alike(call, w, view):
        found = tracer.value(x)
        value = Value(found.ids, origin=found.origin, paths=drop_paths([found.paths]))
    else:
        value = _computed(call, x, w, transposed or groups > 1)
    return value if bias is None else biased(call, value, bias, out)


def _slides_over_channels(call: Call, x: Tensor, w: Tensor) -> Value:
    """Pin channels that lie along positions (efficient channel attention): each one's neighbours are mixed with it."""
    call.pin(call.value(x).ids, Code.SLIDES)
    view = call.view(w)
    if view is not None:
        call.pin_parameter(view.info, Code.SLIDES)
    return nothing(call.outs[0].dim(), call.origin())


def _with_parameter(call: Call, w: Tensor, view: View, axes: tuple[int, ...], x: Tensor, macs: float) -> Value:
    """Consumer of the channels of `x`, and producer."""
    tracer, out, info = call.tracer, call.outs[0], view.info
    transposed, groups = bool(call.arg(6, "transposed")), int(call.arg(8, "groups"))
    taps = math.prod(view.shape[2:])
    dim_in, dim_out = (axes[0], axes[1]) if transposed else (axes[1], axes[0])
    weight = Matrix(info, dim_in, dim_out, info.axis(dim_in), info.axis(dim_out))
    module = tracer.module
    direct = _stock_conv(module) and module is not None and tracer.info_of(module, "weight") is info
    pads = () if direct else tracer.pads_from_input(x)
    padded = transposed and (taps > 1 or bool(np.any(np.array(call.arg(3, "stride")) != 1)))  # borders read fewer taps
    padded = padded or bool(np.any(call.arg(4, "padding"))) or _pads_itself(module if direct else None, taps)
    padded = padded or any(mode == "constant" for _, mode in pads or ())
    kind: SiteKind = "conv_transpose" if transposed else "conv"
    columns, rows = _grouped(call, weight, groups, transposed)
    read = consume(call, weight, x, 1, columns)
    added = call.arg(2, "bias")
    factors, fixed = factors_of(call, w, info)
    plain = [axis for axis in axes if axis >= 0] == list(range(len(info.shape)))  # else no offset is folded through it
    site = Consumer(
        tracer.module_name,
        kind,
        info.name,
        dim_in,
        site_bias(call, direct, added, out.shape[1]) if plain and fixed else None,
        taps,
        padded,
        groups,
        functional=pads is None,
        conv=None if direct else _described(call, axes, pads or ()),
        source=tracer.module_name if direct else f"{tracer.module_name}:{info.name}" if plain and fixed else None,
        factors=factors,
        normal=normal_of(call, w, info, dim_out, weight.columns),
    )
    register(call, weight, read, site, direct, macs)
    tracer.show(site_key(site), lambda: (x.movedim(1, -1), None))
    made = (info.name, dim_out)
    ids = _channels_first(rows, out.dim())
    path = Path() if fixed and factors == (1.0, 1.0) else None
    return Value(ids, paths={made: path}, source=site.source, linear=frozenset((made,)))


def _described(call: Call, axes: tuple[int, ...], pads: tuple[tuple[tuple[int, ...], str], ...]) -> Convolution:
    def numbers(index: int, key: str) -> tuple[int, ...]:
        return tuple(int(n) for n in call.arg(index, key))

    return Convolution(
        stride=numbers(3, "stride"),
        padding=numbers(4, "padding"),
        dilation=numbers(5, "dilation"),
        transposed=bool(call.arg(6, "transposed")),
        output_padding=numbers(7, "output_padding"),
        groups=int(call.arg(8, "groups")),
        axes=axes,
        padded=pads,
    )


def _alike(call: Call, w: Tensor, view: View | None) -> bool:
    """Whether a fixed filter is the same for every channel (a blur), so that it fits any number of them."""
    if view is not None and not view.info.is_buffer:
        return False
    if view is None and call.value(w).has_channels:
        return False
    return not w.is_meta and not isinstance(w, FakeTensor) and bool((w == w[:1]).all())


def _computed(call: Call, x: Tensor, w: Tensor, involved: bool) -> Value:
    """Convolve with a computed weight: it may make channels, and what it reads is pinned.

    involved: its rows are not simply the channels of the result.
    """
    tracer, ndim = call.tracer, call.outs[0].dim()
    view = tracer.view(w)
    fixed = Code.BUFFER_KERNEL(name=view.info.name) if view is not None and view.info.is_buffer else None
    call.pin(tracer.value(x).ids, fixed or Code.NO_PARAMETER)
    if view is not None:  # torch runs a complex one as several real ones
        call.pin_parameter(view.info, Code.COMPLEX_CONVOLUTION if view.info.is_complex else Code.NOT_WHOLE)
        return nothing(ndim, call.origin())
    value = tracer.value(w)
    if involved or varying(value.ids) - {0} or value.ids.shape[0] != w.shape[0]:
        call.pin(value.ids, Code.COMPUTED_KERNEL)
        return nothing(ndim, call.origin())
    for axis in value.paths:
        tracer.trace.axis_macs[axis][tracer.mode] += float(call.outs[0].numel()) * math.prod(w.shape[1:])
    return Value(_channels_first(value.ids.reshape(-1), ndim), paths=value.paths)


def _pads_itself(module: nn.Module | None, taps: int) -> bool:
    """Whether a convolution pads with zeros before the operator ("same" with an even kernel)."""
    return isinstance(module, _ConvNd) and module.padding == "same" and module.padding_mode == "zeros" and taps > 1


def _channels_first(ids: IntArray, ndim: int) -> IntArray:
    return ids.reshape([-1 if i == 1 else 1 for i in range(ndim)])


def _grouped(call: Call, weight: Matrix, groups: int, transposed: bool) -> tuple[IntArray, IntArray]:
    """Return the id that reads each input channel and the id that makes each output channel.

    With several blocks the same position of every block goes together, so that the blocks stay of one size.
    """
    columns, rows = weight.columns, weight.rows
    if groups == 1:
        return columns, rows
    split = (columns if transposed else rows).reshape(groups, -1)
    call.tie(split[1:], np.broadcast_to(split[0], split[1:].shape))
    if transposed:
        return columns, np.tile(rows, groups)
    return np.tile(columns, groups), rows


def _depthwise(call: Call, view: View, dim: int, x: Tensor, groups: int, transposed: bool, macs: float) -> Value:
    """Every block reads one channel: its outputs are removed with it, and it is no producer of its own.

    dim: of the parameter, along which the blocks lie.
    """
    tracer, info = call.tracer, view.info
    channel_ids = info.axis(dim).reshape(groups, -1)
    value = consume(call, Matrix(info, dim, dim, channel_ids[:, 0], channel_ids[:, 0]), x, 1, channel_ids[:, 0])
    tracer.trace.tie(channel_ids[:, 1:], np.broadcast_to(channel_ids[:, :1], channel_ids[:, 1:].shape))
    tracer.trace.axis_macs[(info.name, dim)][tracer.mode] += macs
    ids = np.repeat(channel_ids[:, 0], view.shape[1]) if transposed else channel_ids.reshape(-1)
    return Value(_channels_first(ids, call.outs[0].dim()), paths=drop_paths([value.paths]))
