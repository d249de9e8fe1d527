"""The contractions of a forward pass: products of matrices and convolutions, with the weights that they read.

Holds: seeing them in a pass, and running each by itself, at its own width or narrower. Elsewhere: clocks (timing.py).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from apoptosis.model.dispatch import DispatchMode
from apoptosis.model.passes import internal_passes
from apoptosis.planner.costs import open_axes
from apoptosis.records import Structure

_WIDTHS = 8  # narrower layers are as wide as a multiple of this, as those of a run are
_VALUE = 0.01  # of all numbers: what they are does not matter, but small ones (denormal) would

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Contraction:
    """One call of an operator that multiplies an input by a weight.

    rows: examples, or all positions of a product of matrices. outs, ins: channels. narrow: whether those can shrink.
    macs: multiply-adds. inner: sizes of the input beside rows and channels. kernel: of the weight beside channels.
    convolves: arguments of torch.convolution after the bias; () for a product of matrices. flipped: its weight is
    (in, out). grads: whether input and weight need a gradient. channels_last: of the input's memory.
    """

    rows: int
    outs: int
    ins: int
    narrow: tuple[bool, bool]
    macs: float
    bias: bool
    grads: tuple[bool, bool]
    dtype: torch.dtype
    device: torch.device
    flipped: bool = False
    inner: tuple[int, ...] = ()
    kernel: tuple[int, ...] = ()
    convolves: tuple[Any, ...] = ()
    channels_last: bool = False

    @property
    def blocks(self) -> int:
        """Blocks of channels that are convolved by themselves."""
        return int(self.convolves[5]) if self.convolves else 1

    def narrowed(self, share: float) -> tuple[int, int]:
        """Return (outs, ins) at a share of the channels along each axis that can shrink."""
        if self.blocks > 1 and self.blocks == self.ins:  # depthwise: the blocks go
            ins = _width(self.ins, share if any(self.narrow) else 1.0)
            return ins * (self.outs // self.ins), ins
        outs, ins = (
            self.blocks * _width(size // self.blocks, share if narrow else 1.0)
            for size, narrow in zip((self.outs, self.ins), self.narrow, strict=True)
        )
        return outs, ins

    def macs_at(self, outs: int, ins: int) -> float:
        """Return the multiply-adds at other numbers of channels."""
        if self.blocks > 1 and self.blocks == self.ins:
            return self.macs * outs / self.outs
        return self.macs * outs * ins / (self.outs * self.ins)

    def rows_of(self, scale: float, share: float, fewest: int) -> int:
        """Return the rows to time: a share of those of a step; of positions at least `fewest`, if there are so many."""
        rows = self.rows * scale
        return max(1, round(max(rows * share, 1 if self.convolves else min(rows, fewest))))

    def step(self, rows: int, outs: int, ins: int) -> Callable[[], object]:
        """Return what computes outputs and gradients at these sizes."""
        x, weight, bias = self._operands(rows, outs, ins)
        x.requires_grad_(self.grads[0])
        wanted = [t for t, needed in zip((x, weight), self.grads, strict=True) if needed]
        if self.grads[1]:
            weight.requires_grad_()
            wanted += [] if bias is None else [bias.requires_grad_()]
        if not wanted:
            return self._run(x, weight, bias)
        run = self._run(x, weight, bias)
        grads = torch.full_like(run(), _VALUE).detach()
        return lambda: torch.autograd.grad(run(), wanted, grads)

    def forward(self, rows: int) -> Callable[[], object]:
        """Return what computes outputs at full width."""
        run = self._run(*self._operands(rows, self.outs, self.ins))
        return torch.no_grad()(run)

    def _operands(self, rows: int, outs: int, ins: int) -> tuple[Tensor, Tensor, Tensor | None]:
        def full(*shape: int) -> Tensor:
            return torch.full(shape, _VALUE, dtype=self.dtype, device=self.device)

        blocks = ins if self.blocks == self.ins else self.blocks
        x, bias = full(rows, ins, *self.inner), full(outs) if self.bias else None
        if not self.convolves:
            return x, full(ins, outs) if self.flipped else full(outs, ins), bias
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
        one, other = (ins, outs // blocks) if self.convolves[3] else (outs, ins // blocks)
        return x, full(one, other, *self.kernel), bias

    def _run(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Callable[[], Tensor]:
        if self.convolves:
            blocks = x.shape[1] if self.blocks == self.ins else self.blocks
            stride, padding, dilation, transposed, more = self.convolves[:5]
            return lambda: torch.convolution(x, weight, bias, stride, padding, dilation, transposed, more, blocks)
        if not self.flipped:
            return lambda: functional.linear(x, weight, bias)
        return lambda: torch.mm(x, weight) if bias is None else torch.addmm(bias, x, weight)


def _width(size: int, share: float) -> int:
    if share == 1.0 or size < 2 * _WIDTHS:
        return max(1, round(share * size))
    return max(_WIDTHS, _WIDTHS * round(share * size / _WIDTHS))


@dataclass(slots=True)
class Recorded:
    """What a pass showed.

    weights: by the name of a weight that can shrink, its contractions. num_operators: that the pass ran. nothing: a
    tensor of one element where the model computes.
    """

    nothing: Tensor
    weights: dict[str, Counter[Contraction]] = field(default_factory=dict)
    num_operators: int = 0


def recorded(model: nn.Module, call: Call, structure: Structure) -> Recorded:
    """Run a forward pass in training mode and return its contractions with weights that can shrink.

    Weights that are computed before they are read (normalised ones) and products of two activations are left out.
    """
    tensors = dict(model.named_parameters())
    device = next((p.device for p in tensors.values()), torch.device("cpu"))
    found = Recorded(torch.zeros(1, dtype=torch.float32, device=device))
    args, kwargs = call
    with internal_passes(model, training=True, drop=True, as_is=model.training, grad=True):
        whole = dict(model.named_parameters())  # of sharded ones, too, in here
        with _Watch(found, whole, open_axes(structure)):
            model(*args, **kwargs)
    return found


class _Watch(DispatchMode):
    """Writes down contractions with weights."""

    def __init__(self, found: Recorded, tensors: Mapping[str, Tensor], axes: Mapping[str, set[int]]) -> None:
        super().__init__()
        self._found, self._axes = found, axes
        self._names = {t.untyped_storage()._cdata: name for name, t in tensors.items()}
        self._tensors = tensors
        self._alive: list[Tensor] = []  # casts of weights, whose storage must not be that of another tensor later

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self._found.num_operators += 1
        name = func._schema.name
        if name == "aten::_to_copy" and (known := self._name(args[0])) and out.stride() == args[0].stride():
            self._names[out.untyped_storage()._cdata] = known
            self._alive.append(out)
        elif name in ("aten::mm", "aten::addmm"):
            self._product(args[-2], args[-1], out, bias=name == "aten::addmm")
        elif name == "aten::convolution":
            self._convolution(args, out)
        return out

    def _name(self, tensor: Tensor) -> str:
        return self._names.get(tensor.untyped_storage()._cdata, "")

    def _add(self, name: str, one: Contraction) -> None:
        if any(one.narrow) and one.macs:
            self._found.weights.setdefault(name, Counter())[one] += 1

    def _product(self, x: Tensor, weight: Tensor, out: Tensor, *, bias: bool) -> None:
        name = self._name(weight)
        if not name or self._tensors[name].dim() != 2 or x.numel() == 0:
            return
        flipped = weight.stride(0) == self._tensors[name].stride(0) and weight.stride(1) == self._tensors[name].stride(
            1
        )
        open_dims = self._axes.get(name, set())
        ins, outs = weight.shape
        one = Contraction(
            rows=x.shape[0],
            outs=outs,
            ins=ins,
            narrow=(int(flipped) in open_dims, 1 - int(flipped) in open_dims),
            macs=float(out.numel()) * ins,
            bias=bias,
            grads=(x.requires_grad, weight.requires_grad),
            dtype=x.dtype,
            device=x.device,
            flipped=flipped,
        )
        self._add(name, one)

    def _convolution(self, args: tuple[Any, ...], out: Tensor) -> None:
        x, weight, bias, *rest = args
        name, transposed = self._name(weight), rest[3]
        if not name or self._tensors[name].shape != weight.shape:
            return
        open_dims = self._axes.get(name, set())
        made, read = (1, 0) if transposed else (0, 1)
        kernel = tuple(weight.shape[2:])
        last = x.dim() in (4, 5) and x.is_contiguous(
            memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d
        )
        one = Contraction(
            rows=x.shape[0],
            outs=out.shape[1],
            ins=x.shape[1],
            narrow=(made in open_dims, read in open_dims),
            macs=float(x.numel() if transposed else out.numel()) * weight.shape[1] * math.prod(kernel),
            bias=bias is not None,
            grads=(x.requires_grad, weight.requires_grad),
            dtype=x.dtype,
            device=x.device,
            inner=tuple(x.shape[2:]),
            kernel=kernel,
            convolves=tuple(tuple(r) if isinstance(r, list) else r for r in rest),
            channels_last=last and not x.is_contiguous(),
        )
        self._add(name, one)
