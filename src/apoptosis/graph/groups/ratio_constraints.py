"""Groups of which an event has to keep the same share, because one number of a module is the width of a row of all.

Holds: finding them from the splits and the module's own numbers. Elsewhere: noticing splits
(groups/grids.py), following the numbers (surgery), choosing a share (planner).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction

from torch import nn

from apoptosis.graph.explain import Code
from apoptosis.records import Group, IntArray, Pin, Split

Labels = Mapping[str, tuple[IntArray, ...]]
Row = dict[str, Fraction]
"""What share of the places of a row each group fills."""

_SIZES = ("dim", "size", "width", "d_k", "d_v", "d_q", "d_head", "dk", "dv")


def same_share(
    model: nn.Module,
    groups: Sequence[Group],
    splits: Iterable[Split],
    labels: Labels,
    others: Iterable[set[str]] = (),
    rigid: Iterable[Split] = (),
) -> tuple[Group, ...]:
    """Fill in `Group.tied_groups`, and pin what has one width with a pinned group.

    others: sets of groups of which something else is known to need the same share of each. rigid: splits of channels
    that are all pinned.

    A module that splits queries, keys and values by one plain number of its own (`head_dim`) can only run when all of
    them have as many channels per row; where the width of a row is left to torch (-1), they are independent.
    """
    modules = dict(model.named_modules())
    names = _names(groups, labels)
    governed = _governed(splits, modules, names)
    num_static, fixed = _mixed(governed.values(), {group.name: group.num_channels for group in groups})
    sets = [set().union(*rows) - fixed for rows in governed.values() if any(row != rows[0] for row in rows)]
    together: dict[str, set[str]] = {}
    alike = [("in one tensor", part) for part in others]
    held = _with_pinned(groups, [*_by_number(_governed([*splits, *rigid], modules, names), modules), *alike])
    parts = {g.name: Code.PART_OF_WIDTH().pin(g.name, g.num_channels) for g in groups if g.name in fixed}
    for part in (*sets, *_recurrent(groups, modules), *(part for _, part in alike)):
        united = set(part).union(*(together.get(name, ()) for name in part))
        together.update(dict.fromkeys(united, united))
    return tuple(
        replace(
            g,
            tied_groups=tuple(sorted(together.get(g.name, {g.name}) - {g.name})),
            num_static=num_static.get(g.name, 0),
            pin=g.pin or held.get(g.name) or parts.get(g.name),
        )
        for g in _held(groups, modules)
    )


def _by_number(
    governed: Mapping[tuple[str, str, int], Sequence[Row]], modules: Mapping[str, nn.Module]
) -> list[tuple[str, set[str]]]:
    """Return the groups whose rows have a module's own size of a head, with where that is."""
    found = []
    for (module, kind, number), rows in governed.items():
        sizes = [name for name, value in vars(modules[module]).items() if type(value) is int and value == number]
        if kind == "columns" and any(_is_size(name) for name in sizes):
            found.append((f"in the rows of '{module}'" if module else "in rows of the model", set().union(*rows)))
    return found


def _is_size(attribute: str) -> bool:
    """Whether the name of an attribute speaks of a size, not of how many there are (num_heads, n_head).

    Example:
        >>> _is_size("head_dim"), _is_size("attention_head_size"), _is_size("num_heads")
        (True, True, False)
    """
    return not attribute.startswith(("num", "n_")) and any(part in attribute for part in _SIZES)


def _with_pinned(groups: Sequence[Group], sets: Iterable[tuple[str, set[str]]]) -> dict[str, Pin]:
    """Pin groups that have one width with a group that is pinned; sets: where it is one, and the names."""
    pins = {group.name: group.pin for group in groups if group.pin is not None}
    widths = {group.name: group.num_channels for group in groups}
    causes = {name: pin.reason for name, pin in pins.items()}
    found: dict[str, Pin] = {}
    waiting = list(sets)
    while True:
        ready = [(place, names) for place, names in waiting if names & pins.keys() and names - pins.keys()]
        if not ready:
            return found
        place, names = ready[0]
        first = min(names & pins.keys())
        for name in names - pins.keys():
            causes[name] = causes[first]
            pins[name] = found[name] = _shared(pins[first], causes[first], place, name, widths[name])


def _shared(why: Pin, cause: str, place: str, name: str, num_channels: int) -> Pin:
    """Return the pin of a group that has one width with the group of another pin. cause: where that one's lies."""
    reason = Code.SHARED_WIDTH(other=why.group, place=place, cause=cause)
    return replace(reason, where=why.where, remedy=why.remedy).pin(name, num_channels)


def _mixed(governed: Iterable[Sequence[Row]], widths: Mapping[str, int]) -> tuple[dict[str, int], set[str]]:
    """Say what follows where several groups fill rows of one width, and other rows of that width are filled otherwise.

    The finest of the groups in a row is as wide as it has to be, and the others stay (a partial rotation: the channels
    that are not turned give way).

    Returns: by name, the channels beside a group; the names of the groups that stay.
    """
    num_static: dict[str, int] = {}
    fixed: set[str] = set()
    for rows in governed:
        for row in rows if any(other != row for other in rows for row in rows) else ():
            first = max(row, key=lambda name: (widths[name] / row[name], row[name]))
            fill = widths[first] * (sum(row.values()) - row[first]) / row[first]
            if fill.denominator != 1 or num_static.setdefault(first, int(fill)) != fill:
                fixed.add(first)
            fixed |= set(row) - {first}
    return num_static, fixed


def _recurrent(groups: Sequence[Group], modules: Mapping[str, nn.Module]) -> list[set[str]]:
    """Return the groups of all layers and directions of a recurrence, which share one hidden (and projected) width."""
    found: dict[tuple[str, str], set[str]] = {}
    for group in groups:
        for member in group.members:
            owner, _, leaf = member.tensor.rpartition(".")
            if member.dim == 0 and isinstance(modules.get(owner), nn.RNNBase) and leaf.startswith("weight_"):
                kind = "projected" if leaf.startswith("weight_hr") else "hidden"
                found.setdefault((owner, kind), set()).add(group.name)
    return list(found.values())


def _held(groups: Sequence[Group], modules: Mapping[str, nn.Module]) -> tuple[Group, ...]:
    """Pin the layers and directions of a recurrence of which another one is pinned: they have one width."""
    pins = {group.name: group.pin for group in groups if group.pin is not None}
    held: dict[str, Pin] = {}
    for names in _recurrent(groups, modules):
        pinned = min(names & pins.keys(), default="")
        for name in names - pins.keys() if pinned else ():
            why, num = pins[pinned], next(g.num_channels for g in groups if g.name == name)
            held[name] = _shared(why, why.reason, "in one recurrence", name, num)
    return tuple(replace(g, pin=held[g.name], neuron=None) if g.name in held else g for g in groups)


def _names(groups: Sequence[Group], labels: Labels) -> dict[int, str]:
    """Return the group of every channel class; groups of whole heads own channels of others and are left out."""
    found: dict[int, str] = {}
    for group in groups:
        for member in group.members:
            classes = labels[member.tensor][member.dim][member.positions]
            if bool((classes == classes[:, :1]).all()):
                found.update(dict.fromkeys(classes[:, 0].tolist(), group.name))
    return found


def _governed(
    splits: Iterable[Split], modules: Mapping[str, nn.Module], names: Mapping[int, str]
) -> dict[tuple[str, str, int], list[Row]]:
    """Return what fills the rows of the splits that one number of a module governs, by module and number."""
    found: dict[tuple[str, str, int], list[Row]] = {}
    for split in splits:
        module = modules.get(split.module)
        if module is None or isinstance(module, nn.MultiheadAttention):  # whose widths follow each on their own
            continue
        numbers = {value for value in vars(module).values() if type(value) is int}
        rows, columns = split.classes.shape
        for kind, number in (("columns", columns), ("total", rows * columns)):
            if number in numbers and rows > 1:
                counts = Counter(names[label] for label in split.classes.reshape(-1).tolist() if label in names)
                row = {name: Fraction(count, split.classes.size) for name, count in counts.items()}
                if row:
                    found.setdefault((split.module, kind, number), []).append(row)
    return found
