"""The solver for couplings: pins spread with the reason they began at, components keep the same share."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from apoptosis.graph.explain import Code
from apoptosis.graph.groups.couplings import Coupling, components, coupled
from apoptosis.records import Group, Pin


def group(name: str, *tied: str, pinned: str = "") -> Group:
    pin = Pin(group=name, num_channels=4, reason=pinned, where="net.py:3") if pinned else None
    return Group(name=name, num_channels=4, members=(), sites=(), tied_groups=tied, pin=pin)


@given(st.lists(st.sets(st.integers(0, 9), max_size=4), max_size=8))
def test_components_are_the_finest_partition_that_no_element_crosses(sets: list[set[int]]) -> None:
    found = components(sets)
    assert sorted(place for places in found for place in places) == list(range(len(sets)))
    assert [places[0] for places in found] == sorted(places[0] for places in found)
    unions = [set().union(*(sets[place] for place in places)) for places in found]
    assert all(not a & b for i, a in enumerate(unions) for b in unions[:i])
    for places in found:  # connected: from the first set all others are reached
        reached = {places[0]}
        for _ in places:
            reached |= {p for p in places if any(sets[p] & sets[q] for q in reached)}
        assert reached == set(places)


def test_a_pin_spreads_through_several_couplings_and_names_where_it_began() -> None:
    couplings = [
        Coupling(frozenset("bc"), Code.SHARED_WIDTH, {"place": "in one tensor"}),
        Coupling(frozenset("ab"), Code.SHARED_WIDTH, {"place": "in rows"}, ties=False),
        Coupling(frozenset("de")),
    ]
    found = coupled([*map(group, "bcde"), group("a", pinned="an output")], couplings)
    groups = {g.name: g for g in found}
    pins = {name: str(g.pin.reason) for name, g in groups.items() if g.pin is not None}
    assert pins == {
        "a": "an output",
        "b": "they share the width of 'a' in rows, which is pinned: an output",
        "c": "they share the width of 'b' in one tensor, which is pinned: an output",
    }
    assert groups["c"].pin is not None
    assert (groups["c"].pin.group, groups["c"].pin.where, groups["c"].pin.code) == ("c", "net.py:3", "shared_width")
    ties = {name: g.tied_groups for name, g in groups.items()}
    assert ties == {"a": (), "b": ("c",), "c": ("b",), "d": ("e",), "e": ("d",)}


def test_what_groups_are_tied_to_already_stays() -> None:
    found = coupled([group("a", "b"), group("b", "a"), group("c")], [Coupling(frozenset("bc"))])
    assert [g.tied_groups for g in found] == [("b", "c"), ("a", "c"), ("a", "b")]
    assert coupled([group("a"), group("b", pinned="an output")], [Coupling(frozenset("ab"))])[0].pin is None
