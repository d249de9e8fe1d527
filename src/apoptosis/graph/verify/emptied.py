"""Checking that nothing but a branch has changed once it is a constant.

Holds: the comparison of two structures without what is inside of emptied branches. Elsewhere: rolling back; edits that
remove channels (verification.py).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from apoptosis.errors import StructureChangedError
from apoptosis.graph.trace.scalars import changed_scalar
from apoptosis.graph.verify.verification import verify_classes
from apoptosis.records import Branch, ScalarOperands, Structure

T = TypeVar("T")


def verify_emptied(old: Structure, new: Structure, branches: Sequence[Branch]) -> None:
    """Compare the structure before branches became constants with the one after, but for what was inside of them.

    The same tensors have to be there, tied as before, and reach no pin that they did not reach; the arithmetic outside
    uses the same plain numbers, the network returns as many tensors, and every parameter that is left still has a
    gradient.

    Args:
        old: structure before.
        new: structure of the edited model.
        branches: that were emptied.

    Raises: StructureChangedError: names the tensor, the operator or the parameter.
    """
    gone = {name for branch in branches for name in branch.removed}
    made = {branch.bias for branch in branches}
    left = [name for name in old.shapes if name not in gone]
    odd = sorted((set(left) | made) ^ set(new.shapes))
    if odd:
        raise StructureChangedError(f"emptying a branch changed the set of tensors: {', '.join(odd[:3])}.")
    if old.num_outputs != new.num_outputs:
        raise StructureChangedError(f"the model returned {old.num_outputs} tensors, and now {new.num_outputs}.")
    both = [name for name in left if name in new.shapes]
    for name in both:
        if old.shapes[name] != new.shapes[name]:
            raise StructureChangedError(f"'{name}' has another shape: {new.shapes[name]}.")
    verify_classes(_of(old, both), _of(new, both), {})
    lost = sorted((old.trained & set(both)) - new.trained)
    if lost:
        raise StructureChangedError(f"parameter '{lost[0]}' would get no gradient any more: only the branch needs it.")
    inside = [stand_in.module for branch in branches for stand_in in branch.stand_ins if stand_in.kind != "written_out"]
    for mode, calls in old.scalars.items():
        error = changed_scalar(_outside(calls, inside), _outside(new.scalars.get(mode, ()), inside))
        if error is not None:
            raise error


def _of(structure: Structure, names: Collection[str]) -> Structure:
    """Return a structure of these tensors alone."""
    wanted = frozenset(names)
    groups = [
        replace(group, members=tuple(member for member in group.members if member.tensor in wanted))
        for group in structure.groups
    ]
    return replace(
        structure,
        groups=tuple(group for group in groups if group.members),
        shapes=_chosen(structure.shapes, wanted),
        classes=_chosen(structure.classes, wanted),
    )


def _chosen(found: Mapping[str, T], names: Collection[str]) -> dict[str, T]:
    return {name: value for name, value in found.items() if name in names}


def _outside(calls: Sequence[ScalarOperands], modules: Sequence[str]) -> tuple[ScalarOperands, ...]:
    """Return the calls that ran in none of these modules."""
    return tuple(
        call
        for call in calls
        if not any(call.module == module or call.module.startswith(f"{module}.") for module in modules)
    )
