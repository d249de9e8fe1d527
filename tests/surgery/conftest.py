"""Hand-made structures of small networks, and an exact removal for them."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from apoptosis.errors import CheckpointError
from apoptosis.records import Group, LinearSite, Member, Reduction, SiteReduction, Structure
from apoptosis.surgery import Transaction, build_edits, named_tensors
from apoptosis.surgery.attributes import attributes_of


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


def linear_site(module: str, columns: np.ndarray, num_columns: int, **more: object) -> LinearSite:
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
    return LinearSite(**(fields | more))


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


def train(model, optimizers, steps, first=0):
    for i in range(first, first + steps):
        generator = torch.Generator().manual_seed(i)
        x = torch.randn(11, 5, generator=generator, dtype=torch.float64)
        y = torch.randint(0, 3, (11,), generator=generator)
        loss = nn.functional.cross_entropy(model(x), y)
        for opt in optimizers:
            opt.zero_grad()
        loss.backward()
        for opt in optimizers:
            opt.step()
    return loss


def step(model, opt, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(7, 5, generator=generator), torch.randint(0, 3, (7,), generator=generator)
    loss = nn.functional.cross_entropy(model(x), y)
    opt.zero_grad()
    loss.backward()
    opt.step()


def shrunk(make=torch.optim.AdamW, steps=3):
    """A trained network after a surgery, with its optimizer."""
    model = mlp()
    opt = make(model.parameters())
    for i in range(steps):
        step(model, opt, i)
    structure = mlp_structure(model)
    edits = build_edits(structure, [random_reduction(g, range(1, g.num_channels, 2)) for g in structure.groups])
    with Transaction(model, [opt]) as transaction:
        transaction.apply(edits)
    step(model, opt, 8)
    return model, opt


def contents(model, optimizers=()):
    found = [(n, id(t), t.detach().clone(), t.grad is None) for n, t in named_tensors(model).items()]
    found += [(n, attributes_of(m)) for n, m in model.named_modules()]
    for opt in optimizers:
        found += [copy.deepcopy({k: v for k, v in g.items() if k != "params"}) for g in opt.param_groups]
        found += [(id(p), copy.deepcopy(state)) for p, state in opt.state.items()]
    return found


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype is b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and a == b


class Apo:
    """Stands for apoptosis: anything with nested state."""

    def __init__(self, state=None, refuse=False):
        self.state, self.refuse = state, refuse

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        if self.refuse:
            raise CheckpointError("apoptosis state is of another network")
        self.state = state


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
        train=train,
        step=step,
        shrunk=shrunk,
        contents=contents,
        same=same,
        Apo=Apo,
    )
