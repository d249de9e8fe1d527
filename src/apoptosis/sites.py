"""Consumer sites as linear maps: a weight gathered per channel, and the exact response to whole inputs.

Lives here: what turns a Site and its module's weight into matrices, and the response of a site that reads several
positions of a channel at once (kernels, flattened maps). Does not live here: moments or any choice.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apoptosis.records import Site, SiteReduction

Respond = Callable[[Tensor, Tensor], Tensor]  # (input map restricted to columns, weight restricted alike) -> output

_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def gather_weight(site: Site, weight: Tensor) -> Tensor:
    """The consumer weight as (out, channels, P): every channel's columns and kernel taps side by side, float64."""
    moved = weight.detach().double().movedim(site.dim, 1)  # (out, columns, *taps)
    columns = torch.as_tensor(site.columns, device=weight.device)
    picked = moved[:, columns.reshape(-1)].reshape(moved.shape[0], *columns.shape, -1)
    return picked.flatten(2)


def make_respond(module: nn.Module, site: Site) -> Respond:
    """The module's own linear map without its bias, on inputs and weights restricted to some channels.

    Works on the full weight too. Grouped convolutions are never restricted (their blocks must stay rectangular).
    """
    if isinstance(module, nn.Linear):
        return F.linear
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        transpose = _CONV_TRANSPOSE[len(module.kernel_size)]

        def respond_transpose(x: Tensor, weight: Tensor) -> Tensor:
            return transpose(
                x,
                weight,
                None,
                module.stride,  # type: ignore[arg-type]
                module.padding,  # type: ignore[arg-type]
                module.output_padding,  # type: ignore[arg-type]
                module.groups,
                module.dilation,  # type: ignore[arg-type]
            )

        return respond_transpose
    if isinstance(module, nn.modules.conv._ConvNd):
        convolve = module._conv_forward

        def respond(x: Tensor, weight: Tensor) -> Tensor:
            out: Tensor = convolve(x, weight, None)  # type: ignore[operator]
            return out

        return respond
    raise TypeError(f"'{site.module}' is a {type(module).__name__}, not a linear layer or convolution")


class SampledSite:
    """Exact errors of one group's reductions at a site that reads several positions, on the sampled inputs.

    error: E||W (z - z_hat)||² over sampled outputs; scale: the same for z minus its mean. Both in the units of the
    output, squared, summed over output channels and averaged over output positions.
    """

    def __init__(self, site: Site, sample: Tensor, weight: Tensor, respond: Respond, num_blocks: int) -> None:
        self._axis = sample.dim() - 1 if site.kind == "linear" else 1
        self._respond = respond
        self._site = site
        self._blocks = num_blocks
        self._weight = weight.detach().float()
        self._sample = sample
        self._columns = torch.as_tensor(site.input_columns, device=sample.device)
        z = sample.movedim(self._axis, -1)[..., self._columns]  # (..., channels, P)
        self._z = z
        dims = tuple(range(z.dim() - 2)) if site.kind == "linear" else (*range(z.dim() - 2), z.dim() - 1)
        self.scale = self._energy(z - z.mean(dims, keepdim=True), None)
        self.dropped: Tensor | None = None

    def _energy(self, residual: Tensor, channels: Tensor | None) -> float:
        """Mean over output positions of the squared response to a residual (..., channels, P)."""
        columns = self._columns if channels is None else self._columns[channels]
        if self._blocks == 1:
            weight_columns = torch.as_tensor(self._site.columns, device=residual.device)
            if channels is not None:
                weight_columns = weight_columns[channels]
            x = residual.flatten(-2).movedim(-1, self._axis)
            weight = self._weight.index_select(self._site.dim, weight_columns.reshape(-1))
        else:
            full = torch.zeros_like(self._sample.movedim(self._axis, -1))
            full[..., columns.reshape(-1)] = residual.flatten(-2)
            x, weight = full.movedim(-1, self._axis), self._weight
        out = self._respond(x, weight)
        out_axis = out.dim() - 1 if self._site.kind == "linear" else 1
        squares = out.double().square()
        per_output = squares.mean(tuple(d for d in range(out.dim()) if d != out_axis))
        self.dropped = per_output
        return float(per_output.sum())

    def error(self, keep: Tensor, reduction: SiteReduction) -> float:
        """E||W (z - z_hat)||² of a reduction; `dropped` then holds its parts per output channel."""
        channels = torch.ones(self._z.shape[-2], dtype=torch.bool, device=self._z.device)
        channels[keep] = False
        removed = channels.nonzero().squeeze(1)
        if len(removed) == 0:
            return 0.0
        mix = reduction.mix[:, removed].to(self._z)
        estimate = torch.einsum("...kp,kc->...cp", self._z[..., keep, :], mix)
        if reduction.offset is not None:
            estimate = estimate + reduction.offset[removed].to(self._z)[:, None]
        return self._energy(self._z[..., removed, :] - estimate, removed)


def num_blocks(module: nn.Module) -> int:
    """Blocks of a grouped convolution, 1 for anything else."""
    return module.groups if isinstance(module, nn.modules.conv._ConvNd) else 1
