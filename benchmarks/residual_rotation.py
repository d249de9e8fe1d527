"""Rotate the residual stream of a pre-norm GPT, and its optimizer: one orthogonal map for all that writes and reads.

LayerNorm allows it: once the mean is taken out of everything that is written to the stream, and scale and bias of the
norms are folded into the layers behind them, the norm is an RMSNorm without parameters, which commutes with rotations.
Holds: the axes, the rotation of weights, the chain rule for the optimizer's moments. Elsewhere: runs (residual_width).
Reference: Ashkboos et al., SliceGPT, arXiv 2401.15024.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.paper.networks import GPT

Batch = tuple[Tensor, Tensor]
Run = tuple[GPT, torch.optim.AdamW]
UNKNOWN_SCALE = 1e-6  # of a norm: below it the gradient of what the channel is multiplied by is not known


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """How a gradient becomes one of the new parameter: left^T (gradient - gradient of `bias` x offset) right.

    Exact for gradients, and so for their averages, as long as nothing is cut.
    """

    name: str
    left: Tensor | None = None
    right: Tensor | None = None
    bias: str | None = None
    offset: Tensor | None = None

    def first(self, moments: Mapping[str, Tensor]) -> Tensor:
        """Move a gradient, or an average of gradients."""
        found = moments[self.name].double()
        if self.bias is not None and self.offset is not None:
            found = found - torch.outer(moments[self.bias].double(), self.offset)
        found = found if self.right is None else found @ self.right
        return found if self.left is None else self.left.T @ found

    def second(self, moments: Mapping[str, Tensor]) -> Tensor:
        """Move averages of squared gradients, as if their entries were uncorrelated: nothing else is known of them."""
        found = moments[self.name].double()
        found = found if self.right is None else found @ self.right.square()
        return found if self.left is None else self.left.T.square() @ found


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """What writes to the residual stream, and (owner of a norm, its name, the layers behind it)."""

    tables: list[nn.Embedding]
    writers: list[nn.Linear]
    readers: list[tuple[nn.Module, str, list[nn.Linear]]]

    @property
    def norms(self) -> list[nn.Module]:
        return [getattr(owner, name) for owner, name, _ in self.readers]


def stream_of(model: GPT) -> Stream:
    """Return the layers at the stream of a GPT."""
    readers: list[tuple[nn.Module, str, list[nn.Linear]]] = []
    writers: list[nn.Linear] = []
    for block in model.blocks:
        attention = block.attention
        readers += [(block, "norm1", [attention.query, attention.key, attention.value]), (block, "norm2", [block.fc1])]
        writers += [attention.out, block.fc2]
    readers.append((model, "norm", [model.head]))
    return Stream(tables=[model.tokens, model.positions], writers=writers, readers=readers)


@torch.no_grad()
def principal_axes(model: GPT, inputs: Sequence[Tensor], keep: int) -> Tensor:
    """Return the (width, keep) axes along which what the norms read, mean taken out and normalised, is largest.

    The mean's own direction is never among them: keep is at most width - 1.
    """
    norms = stream_of(model).norms
    width = model.tokens.embedding_dim
    moment = torch.zeros(width, width, dtype=torch.float64)

    def add(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = F.layer_norm(args[0].double(), (width,)).reshape(-1, width)
        moment.addmm_(x.T, x)

    handles = [norm.register_forward_pre_hook(add) for norm in norms]
    for tokens in inputs:
        model(tokens)
    for handle in handles:
        handle.remove()
    mean = torch.full((width, width), 1 / width, dtype=torch.float64)
    _, axes = torch.linalg.eigh(moment - moment.trace() * mean)  # the mean becomes the last axis
    return axes.flip(1)[:, : min(keep, width - 1)]


def random_axes(width: int, keep: int, seed: int) -> Tensor:
    """Return axes by chance, orthogonal to the mean."""
    drawn = torch.randn(width, min(keep, width - 1), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(drawn - drawn.mean(0))[0]


@torch.no_grad()
def rotate(model: GPT, axes: Tensor) -> tuple[GPT, dict[str, Move]]:
    """Return a copy whose stream holds the components along `axes` (width, keep), and how gradients follow.

    With all width - 1 axes orthogonal to the mean the outputs are the same to round-off.
    """
    narrow = copy.deepcopy(model)
    names = {module: name for name, module in narrow.named_modules()}
    stream, (width, keep) = stream_of(narrow), axes.shape
    moves: dict[str, Move] = {}

    def put(layer: nn.Module, move: Move, weight: Tensor, name: str = "weight") -> None:
        old = getattr(layer, name)
        setattr(layer, name, nn.Parameter(weight.to(old.dtype)))
        moves[move.name] = move

    for table in stream.tables:
        put(table, Move(name=f"{names[table]}.weight", right=axes), table.weight.double() @ axes)
        table.embedding_dim = keep
    for layer in stream.writers:
        put(layer, Move(name=f"{names[layer]}.weight", left=axes), axes.T @ layer.weight.double())
        put(layer, Move(name=f"{names[layer]}.bias", left=axes), axes.T @ layer.bias.double(), "bias")
        layer.out_features = keep
    longer = (width / keep) ** 0.5  # a vector of `keep` numbers with rms 1 is shorter than one of `width`
    for owner, norm_name, layers in stream.readers:
        norm = getattr(owner, norm_name)
        scale, offset = norm.weight.double(), norm.bias.double()
        inverse = torch.where(scale.abs() > UNKNOWN_SCALE, 1 / scale, 0.0)
        for layer in layers:
            name, weight = names[layer], layer.weight.double()
            back = inverse[:, None] * axes / longer
            bias = layer.bias.double() + weight @ offset
            put(layer, Move(name=f"{name}.weight", right=back, bias=f"{name}.bias", offset=offset),
                longer * (weight * scale) @ axes)  # fmt: skip
            put(layer, Move(name=f"{name}.bias"), bias, "bias")
            layer.in_features = keep
        eps = norm.eps * width / keep  # of the mean square over the kept channels
        setattr(owner, norm_name, nn.RMSNorm(keep, eps=eps, elementwise_affine=False))
    return narrow, moves


def new_optimizer(model: nn.Module, rate: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), rate, fused=True)


def rotate_optimizer(
    old: Run,
    new: GPT,
    moves: Mapping[str, Move],
    moments: str,
    batches: Sequence[Batch],
) -> torch.optim.AdamW:
    """Return the optimizer of the rotated model.

    moments: "restart": nothing is known of tensors that changed. "diagonal": first moments by the chain rule, second
    ones as if gradients were uncorrelated. "measured": second ones averaged over `batches`.
    """
    model, before = old
    optimizer = new_optimizer(new, before.param_groups[0]["lr"])
    names = {name: parameter for name, parameter in model.named_parameters()}
    kept = {name: before.state[p] for name, p in names.items() if p in before.state}
    if not kept:
        return optimizer
    first, second = ({name: state[key] for name, state in kept.items()} for key in ("exp_avg", "exp_avg_sq"))
    beta = before.param_groups[0]["betas"][1]
    squares = measured_squares(new, batches) if moments == "measured" else {}
    for name, parameter in new.named_parameters():
        changed = name not in moves or moves[name].left is not None or moves[name].right is not None
        if moments == "restart" and changed:
            continue
        if squares:  # Adam divides by this factor: its averages begin with 0
            values = squares[name] * (1 - beta ** float(kept[name]["step"]))
        else:
            values = moves[name].second(second)
        optimizer.state[parameter] = {
            "step": kept[name]["step"].clone(),
            "exp_avg": moves[name].first(first).to(parameter.dtype),
            "exp_avg_sq": values.to(parameter.dtype),
        }
    return optimizer


def measured_squares(model: GPT, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Return the mean squared gradients over the batches, by parameter."""
    sums = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for batch in batches:
        loss_of(model, batch).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            sums[name] += parameter.grad.square() / len(batches)
            parameter.grad = None
    return sums
