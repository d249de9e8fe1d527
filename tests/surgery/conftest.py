"""Hand-made structures of small networks, and an exact removal for them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from apoptosis.records import Group, Member, Reduction, Site, SiteReduction, Structure


def _positions(num: int) -> np.ndarray:
    return np.arange(num, dtype=np.int64)[:, None]


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {n: tuple(t.shape) for n, t in (*model.named_parameters(), *model.named_buffers())}


def mlp(widths: Sequence[int] = (5, 8, 6, 3), dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).to(dtype)


def linear_site(module: str, columns: np.ndarray, num_columns: int, **more: object) -> Site:
    fields = {
        "module": module,
        "kind": "linear",
        "weight": f"{module}.weight",
        "dim": 1,
        "bias": f"{module}.bias",
        "columns": columns,
        "input_columns": columns,
        "num_columns": num_columns,
    }
    return Site(**(fields | more))


def mlp_structure(model: nn.Sequential) -> Structure:
    layers = [(str(i), m) for i, m in enumerate(model) if isinstance(m, nn.Linear)]
    groups = []
    for (name, layer), (reader, _) in itertools.pairwise(layers):
        own = _positions(layer.out_features)
        members = (
            Member(tensor=f"{name}.weight", dim=0, positions=own, role="producer"),
            Member(tensor=f"{name}.bias", dim=0, positions=own, role="bias"),
        )
        site = linear_site(reader, own, layer.out_features)
        groups.append(Group(name=name, num_channels=layer.out_features, members=members, sites=(site,)))
    return Structure(groups=tuple(groups), macs=0.0, shapes=shapes(model))


def selection(keep: Tensor, num: int) -> Tensor:
    mix = torch.zeros(keep.numel(), num, dtype=torch.float64)
    mix[torch.arange(keep.numel()), keep] = 1.0
    return mix


def reduction(
    group: Group,
    keep: Sequence[int],
    mix: Tensor | None = None,
    offset: Tensor | None = None,
    merge: Tensor | None = None,
) -> Reduction:
    index = torch.tensor(keep)
    mix = selection(index, group.num_channels) if mix is None else mix
    sites = {site.key: SiteReduction(mix=mix, offset=offset) for site in group.sites}
    return Reduction(group=group.name, keep=index, sites=sites, merge=merge)


def random_reduction(group: Group, keep: Sequence[int], offset: bool = True, seed: int = 0) -> Reduction:
    """An arbitrary mix of the kept channels for the removed ones; the kept ones pass."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.tensor(keep)
    mix = torch.randn(len(keep), group.num_channels, generator=generator, dtype=torch.float64)
    mix[:, index] = torch.eye(len(keep), dtype=torch.float64)
    shift = torch.randn(group.num_channels, generator=generator, dtype=torch.float64)
    shift[index] = 0.0
    return reduction(group, keep, mix, shift if offset else None)


def make_duplicates_(model: nn.Sequential, twins: dict[str, dict[int, int]]) -> None:
    """Channel j of a layer becomes a copy of channel k, for {layer: {j: k}}."""
    with torch.no_grad():
        for name, pairs in twins.items():
            layer = model.get_submodule(name)
            for j, k in pairs.items():
                layer.weight[j] = layer.weight[k]
                layer.bias[j] = layer.bias[k]


def exact_reductions(structure: Structure, twins: dict[str, dict[int, int]], merge: bool = False) -> list[Reduction]:
    """The reductions that remove those copies without any error."""
    found = []
    for group in structure.groups:
        pairs = twins.get(group.name, {})
        keep = [c for c in range(group.num_channels) if c not in pairs]
        mix = selection(torch.tensor(keep), group.num_channels)
        for j, k in pairs.items():
            mix[keep.index(k), j] = 1.0
        found.append(reduction(group, keep, mix, merge=mix.clone() if merge else None))
    return found


@pytest.fixture(scope="session")
def nets() -> SimpleNamespace:
    return SimpleNamespace(
        mlp=mlp,
        mlp_structure=mlp_structure,
        linear_site=linear_site,
        shapes=shapes,
        positions=_positions,
        reduction=reduction,
        random_reduction=random_reduction,
        make_duplicates_=make_duplicates_,
        exact_reductions=exact_reductions,
    )
