"""The removal oracle: what the structure says may go is really cut out, by plain indexing, and compared."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from apoptosis.graph import analyse, verify
from apoptosis.records import Group, Structure

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
    return [out] if isinstance(out, Tensor) else list(out.values() if isinstance(out, dict) else out)


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
