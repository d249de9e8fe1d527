"""Trying, before anything is removed, whether the model runs with fewer channels, and which of its numbers follow.

Holds: forward passes at smaller widths, the search for the numbers of modules that hold widths, pins for groups
whose widths the model does not give up. Elsewhere: what the numbers become in an event (surgery), numbers of
known names (surgery/splits.py).

A size in a forward pass that is no size of a tensor (`x.split((self.c, self.c), 1)`, `x.view(-1, 512)`) breaks it once
channels are gone. Tensors show a part of their own memory during a trial, so that it costs two passes and no memory.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from apoptosis.distributed.sharded import has_shards
from apoptosis.errors import CaptureError, ShapeError, StructureChangedError, WidthsError
from apoptosis.graph import verify_up_to_scale
from apoptosis.graph.groups.counts import groups_of, with_follows
from apoptosis.graph.trace.failures import Fault, fault_of
from apoptosis.interrupts import restoring
from apoptosis.planner.branches import branches_of
from apoptosis.planner.couplings import absent, common_steps, units_of
from apoptosis.records import Count, Follow, Group, Pin, Reduction, SiteReduction, Structure
from apoptosis.surgery import Transaction, build_edits, check_registered, norm_edits
from apoptosis.surgery.branch_trials import try_branches
from apoptosis.surgery.numbers import number_of, value_of
from apoptosis.surgery.splits import reads_attribute
from apoptosis.surgery.target import Target, broken_pin, first_fault, kept_positions, with_pins, without_branches

_ROUNDS = 40  # faults looked for one after the other; beyond it events find out
_MULTIPLES = 4  # of what an operator is given may be what the module keeps: split(x, self.width // 2)
_CANDIDATES = 12  # numbers tried for one group

_NOT_ASKED = "only towards a target, or early from a pretrained network, are branches emptied"

Names = tuple[str, ...]


def rehearse(
    target: Target, structure: Structure, left_out: Mapping[str, Pin], align: int = 1, *, branches: bool = True
) -> Structure:
    """Return the structure with the numbers of modules that follow widths, and pins for what the model cannot lose.

    The model is afterwards as it was, bitwise. Models whose parameters are spread over processes, or have no data, are
    not tried.

    Args:
        target: the model, and how to call it.
        structure: of the model as it is now.
        left_out: pins of the user's, which are added; such groups are not tried.
        align: widths are multiples of it.
        branches: whether branches may be emptied, which is tried then, too; else none of them may.

    Raises: ArgumentError: `register_attributes` was given names that a module of the model does not have.
    """
    check_registered(target.model)
    structure = with_pins(structure, left_out)
    if not branches:
        structure = without_branches(structure, {branch.name: _NOT_ASKED for branch in branches_of(structure)})
    if has_shards(target.model):
        return try_branches(target, structure)
    if any(p.is_meta or isinstance(p, FakeTensor) for p in target.model.parameters()):
        return structure
    try:
        return try_branches(target, _Rehearsal(target, align).settled(structure))
    finally:
        if target.wrappers:
            target.rebuild_wrappers()


class _Rehearsal:
    """Trials of one model."""

    def __init__(self, target: Target, align: int) -> None:
        self._target, self._align = target, align

    def settled(self, structure: Structure) -> Structure:
        """Search until the model runs with every open group narrower, whole heads apart from the channels in them."""
        fine = tuple(g.name for g in structure.groups if not _is_whole(g))
        whole = tuple(g.name for g in structure.groups if _is_whole(g))
        for names in (fine, whole):
            for _ in range(_ROUNDS):
                fault = self._fault(structure, names)
                if fault is None:
                    break
                better = self._without(structure, names, fault)
                if better is None:
                    break
                structure = better
        return structure

    def _without(self, structure: Structure, names: Names, fault: Fault) -> Structure | None:
        """Return the structure with one fault less; None where no group is found that causes it."""
        for most in (1, _MULTIPLES):
            named = self._following(structure, self._named(structure.counts, most))
            if named is not None and self._fault(named, names) is None:
                return named
        for name in self._suspects(structure, names, fault):
            alone = self._with_equal(structure, name)
            own = self._fault(structure, alone)
            if own is None:
                continue
            for candidate in self._candidates(structure, name, own):
                if self._fault(candidate, self._with_equal(candidate, name)) is None:
                    return candidate
            return with_pins(structure, {n: broken_pin(structure, n, own) for n in alone})
        return None

    # ------------------------------------------------------------------ one trial

    def _fault(self, structure: Structure, names: Iterable[str]) -> Fault | None:
        """Return what goes wrong when these groups get narrower, None for nothing; the model is as it was."""
        ranks = self._target.ranks
        return first_fault(ranks, ranks.run_collectively(partial(self._own_fault, structure, frozenset(names))))

    def _own_fault(self, structure: Structure, names: frozenset[str]) -> Fault | None:
        reductions = [r for groups in units_of(_open(structure, names)) for r in _narrower(groups, self._align)]
        if not reductions:
            return None
        target = self._target
        transaction = Transaction(target.model, trial=True)
        with restoring(transaction.close):
            try:
                edits = build_edits(structure, reductions)
                transaction.rehearse(edits, structure, norm_edits(structure, reductions))
            except WidthsError as error:
                return fault_of(error)
            except ShapeError:  # these widths do not go together, others may
                return None
            try:
                new = target.capture()
                verify_up_to_scale(structure, new, kept_positions(edits))
            except (CaptureError, StructureChangedError) as error:
                return fault_of(error)
        return None

    # ------------------------------------------------------------------ which group is at fault

    def _suspects(self, structure: Structure, names: Names, fault: Fault) -> Iterator[str]:
        """Yield groups that may be at fault: those that its text names, then those that a search by halves finds."""
        found = dict.fromkeys(name for name in (fault.group,) if name in names)
        for count in structure.counts:
            if count.where in fault.places:
                found.update(dict.fromkeys(sorted(groups_of(structure, count))))
        open_names = {g.name for g in _open(structure, names)}
        seen = [name for name in found if name in open_names]
        yield from seen
        yield from self._halved(structure, [name for name in names if name in open_names and name not in seen])

    def _halved(self, structure: Structure, names: Sequence[str]) -> Iterator[str]:
        if len(names) < 2:
            yield from names
            return
        for half in (names[: len(names) // 2], names[len(names) // 2 :]):
            if self._fault(structure, half):
                yield from self._halved(structure, half)

    @staticmethod
    def _with_equal(structure: Structure, name: str) -> Names:
        group = next(g for g in structure.groups if g.name == name)
        return (name, *(n for n in group.tied_groups if n != name))

    # ------------------------------------------------------------------ which number follows

    def _following(self, structure: Structure, follows: Iterable[Follow]) -> Structure | None:
        """Return the structure with further numbers that follow; None where there are none."""
        known = {(f.module, f.attribute, f.index): f for f in structure.follows}
        for follow in follows:
            key = follow.module, follow.attribute, follow.index
            old = known.get(key, follow)
            if old.times != follow.times:
                continue
            places, groups = ({*getattr(old, n), *getattr(follow, n)} for n in ("places", "groups"))
            known[key] = replace(follow, places=tuple(sorted(places)), groups=tuple(sorted(groups)))
        if set(known.values()) == set(structure.follows):
            return None
        return with_follows(structure, known.values(), {f: value_of(self._target.model, f) for f in known.values()})

    def _named(self, counts: Iterable[Count], most: int) -> Iterator[Follow]:
        """Yield the numbers that the lines of source read off a module that runs there, or up to `most` times them."""
        for count in counts:
            for times in range(1, most + 1):
                for module, attribute, index in self._holders(count.modules, count.number * times):
                    if self._reads(count, attribute):
                        places = (count.where,)
                        yield Follow(module=module, attribute=attribute, index=index, places=places, times=times)

    def _reads(self, count: Count, attribute: str) -> bool:
        """Whether the line of source at which an operator is given a number names this attribute."""
        try:
            running = self._target.model.get_submodule(count.modules[0])
        except AttributeError:  # made in the forward pass
            return False
        return reads_attribute(running, count.where, attribute)

    def _holders(self, modules: Iterable[str], value: int) -> Iterator[tuple[str, str, int | None]]:
        """Yield the plain numbers of this value: (module, attribute, place in it), the innermost module first."""
        for name in dict.fromkeys(modules):
            try:
                module = self._target.model.get_submodule(name)
            except AttributeError:  # made in the forward pass
                continue
            for attribute, held in vars(module).items():
                if attribute.startswith("_"):
                    continue
                size = len(held) if isinstance(held, list | tuple) else 0
                for index in (None, *range(size)):
                    if number_of(module, attribute, index) == value:
                        yield name, attribute, index

    def _candidates(self, structure: Structure, name: str, fault: Fault) -> Iterator[Structure]:
        """Yield structures in which further numbers follow the width of a group, likely ones first."""
        counts = [count for count in structure.counts if name in groups_of(structure, count)]
        named, multiples = list(self._named(counts, 1)), list(self._named(counts, _MULTIPLES))
        group = next(g for g in structure.groups if g.name == name)
        single: dict[tuple[str, str, int | None], Follow] = {}
        for count in counts:
            for holder in self._holders(count.modules, count.number):
                old = single.get(holder)
                places = (count.where,) if old is None else (*old.places, count.where)
                single[holder] = Follow(module=holder[0], attribute=holder[1], index=holder[2], places=places)
        by_width = [
            Follow(module=module, attribute=attribute, index=index, groups=(name,))
            for module, attribute, index in self._holders(
                _lineage(self._target.model, fault.module), group.num_channels
            )
        ]
        tried = [
            named,
            multiples,
            *([follow] for follow in single.values()),
            [*single.values()],
            *([f] for f in by_width),
        ]
        for follows in [follows for follows in tried if follows][:_CANDIDATES]:
            found = self._following(structure, follows)
            if found is not None:
                yield found


def _is_whole(group: Group) -> bool:
    return group.name.partition("#")[0].endswith(":heads")


def _open(structure: Structure, names: Iterable[str]) -> list[Group]:
    wanted = frozenset(names)
    return [group for group in structure.open_groups if group.name in wanted]


def _lineage(model: nn.Module, module: str) -> list[str]:
    """Return the module in which a pass failed, and those around it."""
    inside = module in {name for name, _ in model.named_modules()}
    parts = module.split(".") if module and inside else []
    return [".".join(parts[:end]) for end in range(len(parts), -1, -1)]


def _narrower(groups: Sequence[Group], align: int) -> list[Reduction]:
    """Return reductions that take half of the channels of all groups, which keep one share; none where that is none."""
    if absent(groups):
        return []
    found = []
    for group, step in zip(groups, common_steps(groups, groups, align), strict=True):
        wide = group.num_channels + group.num_static
        kept = -(-(wide // step) // 2) * step - group.num_static
        if not 0 < kept < group.num_channels or kept % group.rows:
            return []
        found.append(_reduction(group, kept))
    return found


def _reduction(group: Group, kept: int) -> Reduction:
    """Keep channels that lie in no particular order, equally many of every row; nothing stands in for the rest."""
    draw, length = random.Random(group.name), group.num_channels // group.rows
    rows = [sorted(draw.sample(range(length), kept // group.rows)) for _ in range(group.rows)]
    keep = torch.from_numpy(np.array([row * length + c for row, own in enumerate(rows) for c in own], dtype=np.int64))
    mix = torch.zeros(1, 1, dtype=torch.float64, device="cpu").expand(kept, group.num_channels)
    return Reduction(
        group=group.name, keep=keep, sites={site.key: SiteReduction(mix=mix, offset=None) for site in group.sites}
    )
