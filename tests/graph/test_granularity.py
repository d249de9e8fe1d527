"""What has to stay rectangular: parts of equal size, rows, halves and shuffles, and parts that need not be."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from apoptosis.graph import analyse
from apoptosis.records import Reduction, SiteReduction, Structure
from apoptosis.surgery import build_edits

GEN = torch.Generator().manual_seed(0)
X, IMG = torch.randn(4, 8, generator=GEN), torch.randn(3, 3, 6, 6, generator=GEN)


class Net(nn.Module):
    """a: 8 -> 12, b: width -> 2, and what lies between."""

    def __init__(self, between: Callable[[nn.Module, Tensor], Tensor], width: int = 6, **numbers: int) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b, self.between = nn.Linear(8, 12), nn.Linear(width, 2), between
        for name, number in numbers.items():
            setattr(self, name, number)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self, self.a(x)))


def open_groups(structure: Structure) -> dict[str, int]:
    return {g.name: g.num_channels for g in structure.groups if g.pin is None}


def gated(m: nn.Module, h: Tensor) -> Tensor:
    u, g = h.chunk(2, -1)
    return u * g.sigmoid()


GATES: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "chunk": gated,
    "glu": lambda m, h: torch.nn.functional.glu(h, -1),
    "rows": lambda m, h: (r := h.unflatten(-1, (2, -1)))[:, 0] * r[:, 1].sigmoid(),
    "columns": lambda m, h: (r := h.unflatten(-1, (-1, 2)))[..., 0] * r[..., 1].sigmoid(),
}


@pytest.mark.parametrize("name", GATES)
def test_a_gate_goes_with_what_it_opens(removal, name: str) -> None:
    structure = removal(Net(GATES[name]), (X,), {"a": 6})
    group = structure.groups[0]
    step = [[i, i + 6] for i in range(6)] if name != "columns" else [[2 * i, 2 * i + 1] for i in range(6)]
    assert {m.tensor for m in group.members} == {"a.weight", "a.bias"}
    assert all(m.positions.tolist() == step for m in group.members)
    assert group.rows == 1


def test_halves_for_different_readers_go_together_place_by_place(removal) -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.a, self.b, self.c = nn.Linear(8, 12), nn.Linear(6, 2), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            u, v = self.a(x).chunk(2, -1)
            return self.b(u.relu()), self.c(v.tanh())

    structure = removal(Halves(), (X,), {"a": 6})
    assert structure.groups[0].members[0].positions.tolist() == [[i, i + 6] for i in range(6)]
    assert {s.weight for s in structure.groups[0].sites} == {"b.weight", "c.weight"}


def test_halves_written_as_lengths_are_groups_of_their_own() -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 12), nn.Linear(4, 2), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            u, v = self.a(x).split([4, 8], -1)
            return self.b(u.relu()), self.c(v.tanh())

    structure = analyse(Parts(), (X,), {})
    assert open_groups(structure) == {"a": 4, "a#2": 8}
    assert [g.rows for g in structure.groups[:2]] == [1, 1]
    assert [g.members[0].positions.reshape(-1).tolist() for g in structure.groups[:2]] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7, 8, 9, 10, 11],
    ]


def test_rows_that_are_flattened_again_stay_equally_long(removal) -> None:
    net = Net(lambda m, h: h.unflatten(-1, (3, -1)).flatten(-2).tanh(), 12)
    structure = removal(net, (X,), {"a": 12})
    group = structure.groups[0]
    assert group.rows == 3
    assert group.members[0].positions.reshape(3, 4).tolist() == np.arange(12).reshape(3, 4).tolist()
    (split,) = structure.splits
    assert split.classes.shape == (3, 4)
    assert split.where.startswith("test_granularity.py:")


def test_rows_within_rows_keep_the_finer_ones(removal) -> None:
    def nested(m: nn.Module, h: Tensor) -> Tensor:
        return h.unflatten(-1, (2, -1)).flatten(-2).unflatten(-1, (4, -1)).flatten(-2).tanh()

    structure = analyse(Net(nested, 12), (X,), {})
    assert {split.classes.shape for split in structure.splits} == {(2, 6), (4, 3)}
    group = structure.groups[0]
    assert (group.num_channels, group.rows) in ((12, 4), (3, 1))  # tied place by place is narrower, but right
    removal(Net(nested, 12), (X,), open_groups(structure))


def test_rows_that_overlap_without_nesting_are_tied(removal) -> None:
    def crossed(m: nn.Module, h: Tensor) -> Tensor:
        return (h.unflatten(-1, (2, -1)).flatten(-2) + h.unflatten(-1, (3, -1)).flatten(-2)).tanh()

    structure = analyse(Net(crossed, 12), (X,), {})
    assert {split.classes.shape for split in structure.splits} == {(2, 6), (3, 4)}
    group = structure.groups[0]
    assert group.num_channels < 12 or group.rows == 6 or group.pin is not None


def test_a_part_that_is_the_output_pins_the_other_part() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 12), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            u, v = self.a(x).chunk(2, -1)
            return u, self.b(v)

    structure = analyse(Half(), (X,), {})
    assert open_groups(structure) == {}
    first, second = (g.pin for g in structure.groups[:2])
    assert first is not None
    assert second is not None
    assert "network's output" in first.reason
    assert "split into rows together with channels that are never removed" in second.reason
    assert second.where.startswith("test_granularity.py:")


def test_maxout_over_unflattened_pieces_ties_them(removal) -> None:
    structure = removal(Net(lambda m, h: h.unflatten(-1, (-1, 2)).amax(-1)), (X,), {"a": 6})
    assert structure.groups[0].members[0].positions.tolist() == [[2 * i, 2 * i + 1] for i in range(6)]


def test_maxout_of_halves_ties_its_pieces(removal) -> None:
    structure = removal(Net(lambda m, h: torch.maximum(*h.chunk(2, -1))), (X,), {"a": 6})
    assert structure.groups[0].members[0].positions.tolist() == [[i, i + 6] for i in range(6)]


def shuffle(x: Tensor, groups: int) -> Tensor:
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


class Shuffled(nn.Module):
    """A grouped convolution, a channel shuffle, and what undoes it or not."""

    def __init__(self, *, module: bool, grouped: bool, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b = nn.Conv2d(3, width, 1), nn.Conv2d(width, 8, 1, groups=2 if grouped else 1)
        self.c, self.mix = nn.Conv2d(8, 2, 1), nn.ChannelShuffle(2) if module else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        h = self.mix(h) if self.mix is not None else shuffle(h, 2)
        return self.c(self.b(h).relu())


@pytest.mark.parametrize("module", [True, False], ids=["module", "by hand"])
def test_shuffled_channels_keep_rows(removal, module: bool) -> None:
    structure = removal(Shuffled(module=module, grouped=False), (IMG,), {"a": 8, "b": 8})
    a = structure.groups[0]
    assert a.rows == 2
    assert sorted(a.members[0].positions.reshape(-1).tolist()) == list(range(8))
    (site,) = a.sites
    assert site.columns.reshape(-1).tolist() == [0, 2, 4, 6, 1, 3, 5, 7]


def test_what_stays_of_shuffled_rows_stands_in_the_order_of_the_shuffle() -> None:
    structure = analyse(Shuffled(module=True, grouped=False), (IMG,), {})
    keep = torch.tensor([1, 2, 4, 5])  # of rows 0..3 and 4..7
    mix = torch.eye(8, dtype=torch.float64)[keep]
    site = structure.groups[0].sites[0]
    reduction = Reduction(group="a", keep=keep, sites={site.key: SiteReduction(mix=mix, offset=None)})
    edits = {edit.tensor: edit for edit in build_edits(structure, [reduction])}
    assert edits["a.weight"].keep[0].tolist() == [1, 2, 4, 5]
    assert edits["b.weight"].keep[1].tolist() == [2, 1, 4, 3]  # channels 1, 4, 2, 5


@pytest.mark.parametrize("module", [True, False], ids=["module", "by hand"])
def test_a_shuffle_before_a_grouped_convolution_keeps_its_blocks_alike(removal, module: bool) -> None:
    structure = removal(Shuffled(module=module, grouped=True, width=16), (IMG,), {"a": 4, "b": 4})
    a, b = structure.groups[:2]
    assert a.members[0].positions.tolist() == [[i, i + 4, i + 8, i + 12] for i in range(4)]  # some in either block
    assert b.members[0].positions.tolist() == [[i, i + 4] for i in range(4)]


def test_a_shuffle_before_a_grouped_convolution_may_come_down_to_one_channel(removal) -> None:
    removal(Shuffled(module=False, grouped=True, width=8), (IMG,), {"a": 2, "b": 4})


def test_two_streams_shuffled_together_keep_the_same_share(removal) -> None:
    class Streams(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(shuffle(torch.cat([self.a(x), self.b(x)], 1), 2).relu())

    structure = removal(Streams(), (IMG,), {"a": 4})
    assert {m.tensor for m in structure.groups[0].members} == {"a.weight", "a.bias", "b.weight", "b.bias"}


def test_streams_of_unequal_width_keep_their_halves_alike(removal) -> None:
    class Unequal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.a, self.b, self.c = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 6, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            u, v = torch.cat([self.a(x), self.b(x)], 1).chunk(2, 1)
            return self.c(u * v)

    structure = removal(Unequal(), (IMG,), {"a": 2, "b": 2})
    a, b = ({m.tensor: m.positions.tolist() for m in g.members} for g in structure.groups[:2])
    assert a == {"a.weight": [[0], [1]], "a.bias": [[0], [1]], "b.weight": [[2], [3]], "b.bias": [[2], [3]]}
    assert b == {"b.weight": [[0, 4], [1, 5]], "b.bias": [[0, 4], [1, 5]]}


def test_a_constant_beside_the_channels_pins_the_split() -> None:
    net = Net(lambda m, h: (r := torch.cat([h[:, :6], h.new_ones(4, 6)], -1).unflatten(-1, (4, -1)))[:, 0] + r[:, 3], 3)
    structure = analyse(net, (X,), {})
    for group in structure.groups[:2]:
        assert group.pin is not None
        assert "splits channels together with values that are none" in group.pin.reason
        assert group.pin.where.startswith("test_granularity.py:")


def test_splits_say_where_and_what() -> None:
    structure = analyse(Net(gated), (X,), {})
    assert structure.splits
    for split in structure.splits:
        assert split.module == ""
        assert split.where.startswith("test_granularity.py:")
        assert split.classes.shape == (2, 6)
        assert np.array_equal(split.classes[0], split.classes[1])
