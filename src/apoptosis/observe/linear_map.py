"""Consumer sites as linear maps: a weight gathered per channel, and the exact response to whole inputs.

Holds: what turns a site and its module's weight into matrices, and the response of a site that reads several
positions of a channel at once (kernels, flattened maps). Elsewhere: moments or any choice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apoptosis.records import Convolution, IntArray, LinearSite, Normal, ProductSite, SiteReduction

Respond = Callable[[Tensor, Tensor], Tensor]  # (input map restricted to columns, weight restricted alike) -> output

_MEASURED = 2**22  # outputs on which a reduction of a complex stack is measured
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def read_weight(site: LinearSite, weight: Tensor) -> Tensor:
    """Return the part of the weight that the site reads as (out, columns, *taps), in its own dtype.

    Of a functional site: the selected slice, with all axes but the contracted one flattened into outputs. Of a
    convolution called as a function: laid out as the operator reads it.
    """
    weight, dim = weight.detach(), site.dim
    if site.factors[0] != 1.0:
        weight = weight * site.factors[0]
    if site.normal is not None:
        weight = _normalised(site.normal, weight)
    if site.conv is not None:
        return _laid_out(site.conv, weight).movedim(site.conv.axes.index(dim), 1)
    if not site.functional:
        return weight.movedim(dim, 1)
    for axis, index in sorted(site.select, reverse=True):
        weight = weight.select(axis, index)
    dim -= sum(axis < dim for axis, _ in site.select)
    return weight.movedim(dim, -1).reshape(-1, weight.shape[dim])


def _normalised(normal: Normal, weight: Tensor) -> Tensor:
    """Return a parameter with its rows normalised as they were at capture."""
    rows = weight.double().flatten(1)
    rows = rows - rows.mean(1, keepdim=True) if normal.centred else rows
    scale, length = (torch.from_numpy(part).to(rows.device) for part in (normal.scale, normal.length))
    now = rows.norm(dim=1)
    found = rows * torch.where(now > 0, scale * length / now, 0.0)[:, None]
    return found.view_as(weight).to(weight.dtype)


def _laid_out(conv: Convolution, weight: Tensor) -> Tensor:
    """Return a parameter as the weight that its operator reads."""
    named = [axis for axis in conv.axes if axis >= 0]
    rest = [axis for axis in range(weight.dim()) if axis not in named]  # of size 1
    shape = [weight.shape[axis] if axis >= 0 else 1 for axis in conv.axes]
    return weight.permute(*named, *rest).reshape(shape)


def _convolve(conv: Convolution) -> Respond:
    """Return a convolution without its bias, with the padding of its input."""

    def respond(x: Tensor, weight: Tensor) -> Tensor:
        for sizes, mode in conv.padded:
            x = F.pad(x, sizes, mode=mode)
        out: Tensor = torch.convolution(
            x,
            weight,
            None,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.transposed,
            conv.output_padding,
            conv.groups,
        )
        return out

    return respond


def sums_of(site: ProductSite, rows: int) -> IntArray:
    """Return the sum that every position of a product is in, (channels, P).

    Args:
        site: the product.
        rows: of the group.
    """
    channels, count = site.input_columns.shape
    if site.per_sum:
        return np.asarray(site.input_columns // site.per_sum, dtype=np.int64)
    row = np.arange(channels, dtype=np.int64) // (channels // rows)
    return np.asarray(row[:, None] * count + np.arange(count, dtype=np.int64), dtype=np.int64)


def gather_weight(site: LinearSite, weight: Tensor) -> Tensor:
    """Return the consumer weight as (out, channels, P): a channel's columns and kernel taps side by side.

    Of a complex weight float64, of one in half precision float32, else in the weight's own type; a view of it where
    every column of a weight without taps is a channel, in order.
    """
    read = read_weight(site, weight)
    if read.is_complex():
        moved = real_rows(read, 0)
    else:
        moved = read if read.dtype in (torch.float32, torch.float64) else read.float()
    columns = torch.as_tensor(site.columns, device=weight.device)
    if moved.dim() == 2 and torch.equal(columns, torch.arange(moved.shape[1], device=weight.device)[:, None]):
        return moved[:, :, None]
    picked = moved[:, columns.reshape(-1)].reshape(moved.shape[0], *columns.shape, -1)
    return picked.flatten(2)


def real_rows(x: Tensor, dim: int) -> Tensor:
    """Return a tensor in float64; of a complex one the real parts, and after them along `dim` the imaginary parts."""
    return torch.cat([x.real, x.imag], dim).double() if x.is_complex() else x.double()


def make_respond(module: nn.Module, site: LinearSite) -> Respond:
    """Return the module's own linear map without its bias, for inputs and weights restricted to some channels.

    It takes the full weight, too. Grouped convolutions are never restricted, as their blocks must have equal sizes.
    """
    if isinstance(module, nn.Linear):
        return F.linear
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        transpose, padding = _CONV_TRANSPOSE[len(module.kernel_size)], tuple(int(n) for n in module.padding)

        def respond_transpose(x: Tensor, weight: Tensor) -> Tensor:
            return transpose(
                x,
                weight,
                None,
                module.stride,
                padding,
                module.output_padding,
                module.groups,
                module.dilation,
            )

        return respond_transpose
    if isinstance(module, nn.modules.conv._ConvNd):
        convolve = module._conv_forward

        def respond(x: Tensor, weight: Tensor) -> Tensor:
            out: Tensor = convolve(x, weight, None)
            return out

        return respond
    raise TypeError(f"'{site.module}' is a {type(module).__name__}, not a linear layer or convolution")


class SampledSite:
    """Exact errors of one group's reductions at a site that reads several positions, on the sampled inputs.

    error: E||W (z - z_hat)||² over sampled outputs; scale: the same for everything the module reads minus its mean,
    other groups' channels included. Both in the units of the output, squared, summed over output channels and averaged
    over output positions. dropped: what the variance of every output loses by the reduction measured last.
    """

    def __init__(self, site: LinearSite, sample: Tensor, weight: Tensor, respond: Respond, num_blocks: int) -> None:
        self._axis = 1 if site.channels_first else sample.dim() - 1  # channels of the sample
        self._respond = respond
        self._site = site
        self._blocks = num_blocks
        self._weight = weight.detach().to(sample)
        self._columns = torch.as_tensor(site.input_columns, device=sample.device)
        last = sample.movedim(self._axis, -1)
        self._full = last.shape
        self._z = last[..., self._columns]  # (..., channels, P)
        centred = last - last.mean(tuple(range(last.dim() - 1)), keepdim=True)
        self._sample = sample
        self.scale = float(self._response(centred.movedim(-1, self._axis), self._weight).square().mean(1).sum())
        self._output: Tensor | None = None
        self._change: Tensor | None = None

    def _response(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return the module's outputs without bias, (out, positions) float64."""
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            out = self._respond(x, weight)
        axis = 1 if self._site.channels_first else out.dim() - 1
        return real_rows(out, axis).movedim(axis, 0).flatten(1)

    def _changed_by(self, residual: Tensor, channels: Tensor) -> Tensor:
        """Response to a residual (..., removed channels, P)."""
        if self._blocks == 1:
            weight_columns = torch.as_tensor(self._site.columns, device=residual.device)[channels].reshape(-1)
            x = residual.flatten(-2).movedim(-1, self._axis)
            return self._response(x, self._weight.index_select(self._site.dim, weight_columns))
        full = residual.new_zeros(self._full)
        full[..., self._columns[channels].reshape(-1)] = residual.flatten(-2)
        return self._response(full.movedim(-1, self._axis), self._weight)

    @property
    def dropped(self) -> Tensor | None:
        """What the variance of every output loses, (out,) float64; None before an error was measured."""
        if self._change is None:
            return None
        if self._output is None:
            self._output = self._response(self._sample, self._weight)
        return self._output.var(1, correction=0) - (self._output - self._change).var(1, correction=0)

    def error(self, keep: Tensor, reduction: SiteReduction) -> float:
        """E||W (z - z_hat)||² of a reduction."""
        channels = torch.ones(self._z.shape[-2], dtype=torch.bool, device=self._z.device)
        channels[keep] = False
        removed = channels.nonzero().squeeze(1)
        if len(removed) == 0:
            self._change = None
            return 0.0
        mix = reduction.mix[:, removed].to(self._z)
        estimate = torch.einsum("...kp,kc->...cp", self._z[..., keep, :], mix)
        if reduction.offset is not None:
            estimate = estimate + reduction.offset[removed].to(self._z)[:, None]
        self._change = self._changed_by(self._z[..., removed, :] - estimate, removed)
        return float(self._change.square().mean(1).sum())


def sampled_site(module: nn.Module, site: LinearSite, sample: Tensor, weight: Tensor) -> SampledSite:
    """Measure a site on a sample of whole inputs with the module's own linear map, or that of its operator."""
    if site.conv is not None:
        used = weight.detach() * site.factors[0]
        own = _laid_out(site.conv, used if site.normal is None else _normalised(site.normal, used))
        at = replace(site, dim=site.conv.axes.index(site.dim))
        return SampledSite(at, sample, own, _convolve(site.conv), site.conv.groups)
    if site.functional:
        rows = read_weight(site, weight)
        if site.is_complex:  # a stack has very many outputs
            sample = sample[:: -(-len(sample) * len(rows) // _MEASURED)]
        return SampledSite(replace(site, dim=1), sample, rows, F.linear, 1)
    return SampledSite(site, sample, weight * site.factors[0], make_respond(module, site), num_blocks(module))


def num_blocks(module: nn.Module) -> int:
    """Blocks of a grouped convolution, 1 for anything else."""
    return module.groups if isinstance(module, nn.modules.conv._ConvNd) else 1
