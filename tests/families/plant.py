"""Channels made exactly redundant: a duplicate, a positive multiple, the negative or nothing at all of another one.

Holds: what is written where, from the structure alone. Elsewhere: which groups, and what is asked of the
library afterwards (oracle.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from apoptosis.numerics.activations import NEURON_TYPES
from apoptosis.records import Group, Member, NormSite, Structure

NORM_LEAVES = ("weight", "bias")


def enliven(model: nn.Module, seed: int = 0) -> None:
    """Take a model away from its initial values, which hide mistakes: zero biases, unit scales, weights too small.

    Matrices are scaled so that a signal keeps its size through a ReLU: otherwise deep layers of a small random model
    see constants, and almost all of their channels are redundant by chance.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(like: Tensor) -> Tensor:
        return torch.rand(like.shape, generator=generator).to(like)

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
                value = float(parameter.flatten()[0])
                small = abs(value) < 0.1  # zeros, and layer scales that begin near zero
                parameter.copy_(0.6 * draw(parameter) - 0.3 if small else value * (0.6 + 0.8 * draw(parameter)))
            elif parameter.dim() > 1:
                inputs = parameter[0].numel()
                parameter.mul_(math.sqrt(2.0 / inputs) / float(parameter.square().mean().sqrt()))


def settle(model: nn.Module, once: Callable[[], object], seed: int = 0) -> None:
    """Fit biases and running statistics to the data, roughly.

    Biases become such that no neuron is silent or always on by chance; running statistics come near those of the data,
    but not equal to them: both modes must be told apart.

    Args:
        once: runs the model once in training mode.
    """
    generator = torch.Generator().manual_seed(seed)

    def shaken(like: Tensor) -> Tensor:
        return (torch.rand(like.shape, generator=generator) - 0.5).to(like)

    def centre(module: nn.Module, args: object, output: Tensor) -> Tensor:
        bias, dim = module.bias, -1 if isinstance(module, nn.Linear) else 1
        if not isinstance(bias, nn.Parameter) or not isinstance(output, Tensor) or output.dim() < 2:
            return output
        moved = output.movedim(dim, -1).reshape(-1, output.shape[dim])
        change = -moved.mean(0) + 0.5 * moved.std(0) * shaken(bias)
        bias += change
        return (output.movedim(dim, -1) + change).movedim(-1, dim)

    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)]
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    handles = [layer.register_forward_hook(centre) for layer in layers]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        once()
        for handle in handles:
            handle.remove()
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            mean, var = norm.running_mean, norm.running_var
            assert mean is not None
            assert var is not None
            mean += 0.2 * var.sqrt() * shaken(mean)
            var *= 1.0 + 0.4 * shaken(var)


def plant(model: nn.Module, structure: Structure, name: str, num: int, *, seed: int = 0) -> None:
    """Make `num` channels of a group exactly redundant, equally many in every row, in both modes.

    Only producers' rows and what is met channel by channel on the way are written; the values of the channel are then
    exact copies (multiples, negatives, zeros) whatever the inputs. In a product, the left operand's rows alone.

    Raises: KeyError: no such group. ValueError: the group is pinned, or `num` does not fit it.
    """
    groups = {group.name: group for group in structure.groups}
    if name not in groups:
        raise KeyError(f"no group '{name}'; there are: {', '.join(groups)}")
    group = groups[name]
    if group.pin is not None:
        raise ValueError(f"pinned: {group.pin}")
    if num % group.rows or num // group.rows >= group.num_channels // group.rows:
        raise ValueError(f"'{name}' has {group.num_channels} channels in {group.rows} rows: {num} cannot be planted")
    per_row = num // group.rows
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    kinds = kinds_of(group)
    with torch.no_grad():
        for number, (victim, source) in enumerate(pairs(group, per_row, seed)):
            _write(tensors, group, kinds[(number + seed) % len(kinds)], victim, source)


def kinds_of(group: Group) -> tuple[str, ...]:
    """Which kinds of redundancy are exact in a group: some need to know how its channels are computed."""
    if any(site.kind == "product" for site in group.sites):
        return ("zero",) if any(site.weight == "" for site in group.sites) else ("duplicate", "zero")
    if any(isinstance(site, NormSite) and site.strategy == "plain" for site in group.sites):
        return ("zero",)  # such a norm cannot tell its mean square without the channels that went
    neuron = group.neuron
    if neuron is None:
        return ("duplicate",)
    kinds = ["duplicate"]
    affine = neuron.norm is None or any(m.tensor == f"{neuron.norm}.bias" for m in group.members)
    kind = NEURON_TYPES.get(neuron.activation)
    if kind is None or not affine:
        return tuple(kinds)
    args = kind.fill(neuron.args)
    symmetry = kind.symmetry(*args)
    if symmetry.homogeneous:
        kinds.append("scale")
    if symmetry.reflection == 0.0 and not neuron.max_pool:
        kinds.append("negate")
    if neuron.slopes is not None or float(kind.phi(torch.zeros(1, dtype=torch.float64), *args)) == 0.0:
        kinds.append("zero")
    return tuple(kinds)


def pairs(group: Group, per_row: int, seed: int) -> Iterator[tuple[int, int]]:
    """(victim, source) channels; both of one row, the same places in all rows, sources never victims."""
    length = group.num_channels // group.rows
    order = np.random.default_rng(seed).permutation(length)
    victims, sources = order[:per_row], order[per_row:]
    for index, victim in enumerate(victims):
        for row in range(group.rows):
            yield int(row * length + victim), int(row * length + sources[index % len(sources)])


def _write(tensors: dict[str, Tensor], group: Group, kind: str, victim: int, source: int) -> None:
    members = list(_written(group))
    if kind == "zero":
        norm = None if group.neuron is None else group.neuron.norm
        affine = {f"{norm}.{leaf}" for leaf in NORM_LEAVES}
        added = group.under_norm  # positions and their like
        for member in members:
            if added or member.role != "channelwise" or member.tensor in affine:
                _rows(tensors, member, victim).zero_()
        return
    for member in members:
        _copy(tensors[member.tensor], member, victim, source)
    if kind in ("scale", "negate"):
        factor = 2.0 if kind == "scale" else -1.0
        neuron = group.neuron
        assert neuron is not None
        names = {f"{neuron.norm}.{leaf}" for leaf in NORM_LEAVES} if neuron.norm else {neuron.weight, neuron.bias}
        for member in members:
            if member.tensor in names:
                _rows(tensors, member, victim).mul_(factor)


def _written(group: Group) -> Iterable[Member]:
    """The members that make a channel: all of them, but the left operand's alone in a product."""
    right = {(s.weight, s.dim): s.columns for s in group.sites if s.kind == "product"}
    biases = {(s.bias, 0): s.columns for s in group.sites if s.kind == "product"}
    for member in group.members:
        taken = {**right, **biases}.get((member.tensor, member.dim))
        if taken is None:
            yield member
            continue
        left = ~np.isin(member.positions, taken)
        if left.any():
            positions = member.positions[left].reshape(len(member.positions), -1)
            yield Member(tensor=member.tensor, dim=member.dim, positions=positions, role=member.role)


class _Rows:
    """The slice of a tensor that one channel owns along one axis, written in place."""

    def __init__(self, tensor: Tensor, dim: int, index: Tensor) -> None:
        self._tensor, self._dim, self._index = tensor, dim, index

    def mul_(self, factor: float) -> None:
        values = self._tensor.index_select(self._dim, self._index) * factor
        self._tensor.index_copy_(self._dim, self._index, values)

    def zero_(self) -> None:
        self._tensor.index_fill_(self._dim, self._index, 0.0)


def _rows(tensors: dict[str, Tensor], member: Member, channel: int) -> _Rows:
    return _Rows(tensors[member.tensor], member.dim, torch.as_tensor(member.positions[channel]))


def _copy(tensor: Tensor, member: Member, victim: int, source: int) -> None:
    values = tensor.index_select(member.dim, torch.as_tensor(member.positions[source]))
    tensor.index_copy_(member.dim, torch.as_tensor(member.positions[victim]), values)
