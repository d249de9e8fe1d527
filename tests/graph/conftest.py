"""The removal oracles: what the structure says may go is really cut out, and compared with the silenced model.

`oracle` cuts by plain indexing, which is enough for plain layers. `removal` lets the surgery cut, which also follows
the modules' own numbers (hidden_size, num_heads, head_dim), keeps rows of equal length and groups that go together, and
knows products of activations. What is compared with is in both the full model, silenced by plain indexing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from apoptosis.graph import analyse, verify
from apoptosis.records import Group, Reduction, SiteReduction, Structure
from apoptosis.surgery import Transaction, build_edits

Kept = dict[str, dict[int, np.ndarray]]


def _tensor(model: nn.Module, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    found = getattr(model.get_submodule(owner), leaf)
    assert isinstance(found, Tensor)
    return found


def _replace(model: nn.Module, name: str, value: Tensor, aliases: Mapping[str, str]) -> None:
    old = _tensor(model, name)
    new: Tensor = nn.Parameter(value) if isinstance(old, nn.Parameter) else value
    for alias in (name, *(a for a, first in aliases.items() if first == name)):
        owner, _, leaf = alias.rpartition(".")
        setattr(model.get_submodule(owner), leaf, new)


def _blocks_left(module: nn.Module, kept: np.ndarray) -> int:
    return len(set((kept // (module.weight.shape[0] // module.groups)).tolist()))


def kept_after(structure: Structure, group: Group, removed: list[int]) -> Kept:
    kept: Kept = {}
    parts = [(m.tensor, m.dim, m.positions) for m in group.members]
    parts += [(s.weight, s.dim, s.columns) for s in group.sites]
    for tensor, dim, positions in parts:
        gone = set(positions[removed].reshape(-1).tolist())
        size = structure.shapes[tensor][dim]
        kept.setdefault(tensor, {})[dim] = np.array([i for i in range(size) if i not in gone])
    return kept


def cut(model: nn.Module, structure: Structure, kept: Kept) -> nn.Module:
    small = copy.deepcopy(model)
    for name, dims in kept.items():
        module = small.get_submodule(name.rpartition(".")[0])
        if hasattr(module, "groups") and module.groups > 1 and 0 in dims and name.endswith("weight"):
            module.groups = _blocks_left(module, dims[0])
        value = _tensor(small, name).detach()
        for dim, positions in dims.items():
            value = value.index_select(dim, torch.from_numpy(positions))
        _replace(small, name, value.clone(), structure.aliases)
    return small


def silenced(model: nn.Module, group: Group, removed: list[int]) -> nn.Module:
    full = copy.deepcopy(model)
    with torch.no_grad():
        for site in group.sites:
            columns = torch.from_numpy(site.columns[removed].reshape(-1))
            _tensor(full, site.weight).index_fill_(site.dim, columns, 0.0)
    return full


def _run(model: nn.Module, args: Any, kwargs: Any, *, training: bool) -> list[Tensor]:
    torch.manual_seed(0)
    with torch.no_grad():
        out = copy.deepcopy(model).train(training)(*args, **kwargs)
    return [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]


@pytest.fixture
def oracle() -> Callable[..., Structure]:
    def check(
        model: nn.Module,
        args: tuple[Any, ...],
        widths: Mapping[str, int],
        kwargs: Mapping[str, Any] | None = None,
        *,
        training: bool = True,
        every: int = 3,
    ) -> Structure:
        """Groups that may shrink are exactly `widths`; each, cut, computes what the silenced model computes."""
        kwargs = kwargs or {}
        structure = analyse(model, args, kwargs)
        assert {g.name: g.num_channels for g in structure.groups if g.pin is None} == dict(widths)
        for group in structure.groups:
            assert "could not be followed" not in str(group.pin)
            if group.pin is not None or group.num_channels < 2:
                continue
            removed = list(range(1, group.num_channels, every))
            kept = kept_after(structure, group, removed)
            small, full = cut(model, structure, kept), silenced(model, group, removed)
            for mode in (True, False) if training else (False,):
                for a, b in zip(
                    _run(full, args, kwargs, training=mode), _run(small, args, kwargs, training=mode), strict=True
                ):
                    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
            verify(structure, analyse(small, args, kwargs), kept)
        return structure

    return check


def _spread(group: Group) -> list[int]:
    """Half of every row of the group's channels, other ones in every row."""
    length = group.num_channels // group.rows
    return sorted(row * length + (row + 1 + 2 * i) % length for row in range(group.rows) for i in range(length // 2))


def suspended(model: nn.Module, groups: Iterable[Group], removed: Mapping[str, list[int]]) -> nn.Module:
    """The model in which no site reads the channels; where they are multiplied in pairs, both factors are zero."""
    full = copy.deepcopy(model)
    with torch.no_grad():
        for group in groups:
            gone = removed[group.name]
            for site in group.sites:
                if site.kind != "product":
                    weight, dim = _tensor(full, site.weight), site.dim
                    for at, index in sorted(getattr(site, "select", ()), reverse=True):
                        weight, dim = weight.select(at, index), dim - (at < dim)
                    weight.index_fill_(dim, torch.from_numpy(site.columns[gone].reshape(-1)), 0.0)
            if any(site.kind == "product" for site in group.sites):
                for member in group.members:
                    if member.role != "channelwise":
                        places = torch.from_numpy(member.positions[gone].reshape(-1))
                        _tensor(full, member.tensor).index_fill_(member.dim, places, 0.0)
    return full


def taken_out(
    model: nn.Module, structure: Structure, groups: Iterable[Group], removed: Mapping[str, list[int]]
) -> tuple[nn.Module, dict[str, Mapping[int, Tensor]]]:
    """The model without the channels, nothing in their place, and the positions kept."""
    reductions = []
    for group in groups:
        keep = torch.tensor([c for c in range(group.num_channels) if c not in removed[group.name]])
        mix = torch.eye(group.num_channels, dtype=torch.float64)[keep]
        sites = {site.key: SiteReduction(mix=mix, offset=None) for site in group.sites}
        reductions.append(Reduction(group=group.name, keep=keep, sites=sites))
    small, edits = copy.deepcopy(model), build_edits(structure, reductions)
    with Transaction(small, (), ()) as transaction:
        transaction.apply(edits, structure)
        transaction.commit()
    return small, {edit.tensor: edit.keep for edit in edits}


@pytest.fixture
def removal() -> Callable[..., Structure]:
    def check(
        model: nn.Module,
        args: tuple[Any, ...],
        widths: Mapping[str, int],
        kwargs: Mapping[str, Any] | None = None,
        *,
        modes: tuple[bool, ...] = (True, False),
    ) -> Structure:
        """Groups that may shrink are exactly `widths`; each, taken out with its equals, leaves what muting leaves."""
        kwargs, model = kwargs or {}, copy.deepcopy(model).double()
        args = tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, args)
        structure = analyse(model, args, kwargs)
        open_groups = {g.name: g for g in structure.groups if g.pin is None}
        assert {name: g.num_channels for name, g in open_groups.items()} == dict(widths)
        assert not any("could not be followed" in str(g.pin) for g in structure.groups)
        for group in open_groups.values():
            groups = [group, *(open_groups[name] for name in group.tied_groups)]
            removed = {g.name: _spread(g) for g in groups}
            assert all(removed.values()), "a row of one channel: too small for this oracle"
            full = suspended(model, groups, removed)
            small, kept = taken_out(model, structure, groups, removed)
            assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
            verify(structure, analyse(small, args, kwargs), kept)
            for mode in modes:
                outs = [_run(net, args, kwargs, training=mode) for net in (full, small)]
                for a, b in zip(*outs, strict=True):
                    torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-10, msg=lambda m, g=group: f"{g.name}: {m}")
                assert not _same(outs[1], _run(model, args, kwargs, training=mode)), f"{group.name} changes nothing"
        return structure

    return check


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.allclose(x, y, rtol=1e-6, atol=1e-9) for x, y in zip(a, b, strict=True))
