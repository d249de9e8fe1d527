"""What is asked of a random network: what its structure says may shrink is planted, must be found, and costs nothing.

Two oracles. `shrinks`: redundancy is planted in every open group, removed at tolerance 0, and the properties of the
families' oracle are checked. `cuts`: random channels of all open groups are cut out, with nothing in their place, and
the small network computes what the whole one computes when nobody reads these channels; no data, no criterion.
Elsewhere: the networks (generator.py, blocks.py).
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import gcd

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Adam

from apoptosis import shrink_
from apoptosis.errors import ShapeError
from apoptosis.graph import analyse, verify_up_to_scale
from apoptosis.records import Group, Reduction, SiteReduction, Structure
from apoptosis.surgery import Transaction, build_edits
from families.family import Family, first_tensor
from families.generator import Network
from families.oracle import (
    Operation,
    check_attributes,
    check_checkpoint,
    check_eval_outputs,
    check_gradients,
    check_train_outputs,
    difference,
    quiet,
)
from families.plant import enliven, plant, settle

ROWS = 96
TOLERANCE = 1e-10


@dataclass(frozen=True, kw_only=True)
class _Trial(Operation):
    """exactly: no more was removed than planted. Else the errors are those that tolerance 0 stands for.

    Even so they may be ten times those of the families: these networks are not initialised to be well conditioned, and
    a mix is solved from a Gram matrix, whose condition is the square of the channels'.
    """

    exactly: bool
    magnified: float = 10.0

    @property
    def tolerance(self) -> float:
        return self.magnified * TOLERANCE if self.exactly else 1e-6


class InvalidNetworkError(Exception):
    """The network does not train as it is: nothing can be asked of it."""


def check(network: Network, seed: int = 0) -> None:
    """Both oracles. Raises AssertionError with the property that broke, InvalidNetworkError for a bad network."""
    model, structure = prepared(network, seed)
    with saying("cut"):
        cuts(network, model, structure, seed)
    with saying("shrink"):
        shrinks(network, model, structure, seed)


@contextmanager
def saying(what: str) -> Iterator[None]:
    """Name the oracle in what fails; anything that is raised is a failure."""
    try:
        yield
    except Exception as error:
        if "hardly vary" in str(error):
            raise InvalidNetworkError(str(error)) from error
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error


def prepared(network: Network, seed: int) -> tuple[nn.Module, Structure]:
    """The network after its initial values, and its structure."""
    model = network.build(seed=seed)
    enliven(model, seed)
    try:
        quiet(model)
        first_tensor(model(network.example(ROWS, seed=9))).square().mean().backward()
        with torch.no_grad():
            out = first_tensor(model.eval()(network.example(ROWS, seed=9)))
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise InvalidNetworkError(str(error)) from error
    spread = float((out - out.mean(0)).norm())
    if not 1e-3 < spread < 1e4:
        raise InvalidNetworkError(f"outputs of spread {spread}")
    model.zero_grad()
    with saying("capture"):
        structure = analyse(model, (network.example(4),))
    return model, structure


# ------------------------------------------------------------------------------------------- planted, found, removed


def shrinks(network: Network, model: nn.Module, structure: Structure, seed: int) -> None:
    """Plant in every open group, shrink with tolerance 0, check."""
    model = copy.deepcopy(model)
    optimizer = Adam(model.parameters(), lr=3e-3)
    quiet(model)
    first_tensor(model(network.example(ROWS, seed=9))).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    settle(model, lambda: model(network.example(ROWS, seed=9)), seed)
    model.eval()
    planted: dict[str, int] = {}
    groups = chosen(structure, seed)
    steps = steps_of(groups)
    for number, group in enumerate(groups):
        step = steps[group.name]
        of = group.num_channels // group.rows // step
        if of > 1:
            planted[group.name] = max(1, of // 3) * step * group.rows
            plant(model, structure, group.name, planted[group.name], seed=seed + number)
    before = copy.deepcopy(model)
    batches = [network.example(ROWS, seed=seed + 10 + i) for i in range(2)]
    event = shrink_(model, network.example(4), batches, tolerance=0, align=1, optimizer=optimizer)
    exactly = all(before - after <= planted.get(name, 0) for name, (before, after) in event.groups.items())

    def example(rows: int) -> Tensor:
        """Any inputs, where no more went than was planted; else those that were shown."""
        return network.example(rows, seed=torch.initial_seed() % 997) if exactly else batches[0][:rows]

    family = Family(name="random", build=lambda: network.build(seed=1), example=example, groups=planted)
    operation = _Trial(
        exactly=exactly,
        family=family,
        dtype=torch.float64,
        before=before,
        after=model,
        optimizer=optimizer,
        event=event,
        planted=planted,
        not_planted={},
        widths={group.name: group.num_channels for group in structure.groups},
    )
    _found(network, operation, structure)
    if exactly:  # batch normalisation divides by the batch's own spread, which may be small
        check_train_outputs(replace(operation, magnified=1e3))
    for checked in (check_eval_outputs, check_attributes, check_checkpoint, check_gradients):
        checked(operation)


def _found(network: Network, operation: Operation, structure: Structure) -> None:
    """What was planted is gone, what is pinned is as it was."""
    pinned = {group.name for group in structure.groups if group.pin is not None}
    assert not pinned & set(operation.event.groups), f"pinned and shrunk: {pinned & set(operation.event.groups)}"
    for group in structure.groups:
        if group.pin is None and not group.conflicts_with:
            continue
        if group.pin is not None:
            for member in group.members:
                name, dim = member.tensor, member.dim
                lost = structure.shapes[name][dim] - _tensor(operation.after, name).shape[dim]
                others = {m.tensor: m for g in structure.groups if g.pin is None for m in g.members}
                sites = {s.weight for g in structure.groups if g.pin is None for s in g.sites}
                assert lost == 0 or name in others or name in sites, f"pinned '{name}' lost {lost} along dim {dim}"
    if network.literal:
        return
    for name, num in operation.planted.items():
        width = operation.widths[name]
        kept = operation.event.groups.get(name, (width, width))[1]
        notes = "; ".join(operation.event.notes)
        if "self.training" in network.source and f"{name}: not observed yet" in notes:
            continue  # read in training mode too, which shrink_ does not run
        if "of an nn.LSTM with projections would not exceed" in notes:
            continue  # torch tells such an LSTM by its widths, so not every width is open to it
        assert kept <= width - num, f"not found: '{name}': {width} channels, {num} planted, {kept} kept; {notes}"


# -------------------------------------------------------------------------------------- cut out, nothing in its place


def chosen(structure: Structure, seed: int) -> list[Group]:
    """Open groups of which none excludes another: now whole heads, now the channels inside them."""
    groups = [group for group in structure.groups if group.pin is None]
    dice = random.Random(seed)
    out: set[str] = set()
    for group in groups:
        if group.conflicts_with and dice.random() < 0.5:
            out |= set(group.conflicts_with)
        elif group.conflicts_with:
            out.add(group.name)
    return [group for group in groups if group.name not in out]


def steps_of(groups: list[Group]) -> dict[str, int]:
    """How many channels per row may go at once, so that groups which keep the same share can."""
    lengths = {group.name: group.num_channels // group.rows for group in groups}
    return {
        group.name: lengths[group.name]
        // gcd(lengths[group.name], *(lengths.get(name, 0) for name in group.tied_groups))
        for group in groups
    }


def cuts(network: Network, model: nn.Module, structure: Structure, seed: int) -> None:
    """Cut random channels out of all open groups at once and compare with the network in which nobody reads them."""
    dice = random.Random(seed)
    removed: dict[str, list[int]] = {}
    groups = chosen(structure, seed)
    steps, drawn = steps_of(groups), dict[frozenset[str], int]()
    for group in groups:
        length, step = group.num_channels // group.rows, steps[group.name]
        share = drawn.setdefault(frozenset((group.name, *group.tied_groups)), dice.randrange(length // step))
        num = min(share * step, length - group.min_channels)
        places = [row * length + i for row in range(group.rows) for i in dice.sample(range(length), num)]
        if places:
            removed[group.name] = sorted(places)
    if not removed:
        return
    full = silenced(model, structure, removed)
    try:
        small, kept = cut(full, structure, removed)
    except ShapeError as error:
        if "of an nn.LSTM with projections" in str(error):
            return  # torch tells such an LSTM by its widths, so this one is refused
        raise
    try:
        verified = analyse(small, (network.example(4),))
        scales = verify_up_to_scale(structure, verified, kept)
    except Exception:
        if network.literal:
            return  # refused, as it has to be
        raise
    if network.literal:
        return
    with Transaction(small) as transaction:
        transaction.rescale(scales)
    for training in (False, True):
        outs = []
        for net in (full, small):
            quiet(net) if training else net.eval()
            torch.manual_seed(0)
            with torch.no_grad():
                outs.append(first_tensor(copy.deepcopy(net)(network.example(16, seed=5))))
        error = difference(outs[1], outs[0])
        mode = "training" if training else "evaluation"
        assert error <= TOLERANCE, f"{removed} cut: outputs differ by {error:.3g} in {mode} mode"


def _tensor(model: nn.Module, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    found = getattr(model.get_submodule(owner), leaf)
    assert isinstance(found, Tensor)
    return found


def _fill(tensor: Tensor, dim: int, positions: np.ndarray) -> None:
    tensor.index_fill_(dim, torch.from_numpy(positions.reshape(-1)), 0.0)


def silenced(model: nn.Module, structure: Structure, removed: Mapping[str, list[int]]) -> nn.Module:
    """The network in which no site reads the channels; in a product, their producers put out nothing."""
    full = copy.deepcopy(model)
    with torch.no_grad():
        for group in structure.groups:
            gone = removed.get(group.name, [])
            for site in group.sites if gone else ():
                if site.kind != "product":
                    weight = _tensor(full, site.weight)
                    dim = site.dim
                    for at, index in sorted(getattr(site, "select", ()), reverse=True):
                        weight, dim = weight.select(at, index), dim - (at < dim)
                    _fill(weight, dim, site.columns[gone])
            if gone and any(site.kind == "product" for site in group.sites):
                for member in group.members:
                    if not member.is_buffer:
                        _fill(_tensor(full, member.tensor), member.dim, member.positions[gone])
    return full


def cut(
    full: nn.Module, structure: Structure, removed: Mapping[str, list[int]]
) -> tuple[nn.Module, dict[str, Mapping[int, Tensor]]]:
    """The network without the channels, nothing in their place; and the positions kept."""
    reductions = []
    for group in structure.groups:
        if group.name in removed:
            keep = torch.tensor([c for c in range(group.num_channels) if c not in removed[group.name]])
            mix = torch.eye(group.num_channels, dtype=torch.float64)[keep]
            sites = {site.key: SiteReduction(mix=mix, offset=None) for site in group.sites}
            reductions.append(Reduction(group=group.name, keep=keep, sites=sites))
    small = copy.deepcopy(full)
    edits = build_edits(structure, reductions)
    with Transaction(small, (), ()) as transaction:
        transaction.apply(edits, structure)
        transaction.commit()
    return small, {edit.tensor: edit.keep for edit in edits}
