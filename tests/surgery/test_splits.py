"""Numbers that a forward pass splits channels by, and the attributes that hold them."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from apoptosis import shrink_
from apoptosis.checkpoint import load, save
from apoptosis.errors import ShapeError
from apoptosis.graph import analyse, verify
from apoptosis.records import Split, Structure, TensorEdit
from apoptosis.surgery import Transaction, build_edits
from apoptosis.surgery.attributes import attributes_of
from apoptosis.surgery.splits import VOCABULARY, SplitChange, followed, split_changes


class Attention(nn.Module):
    """Attention by hand whose heads' sizes are plain attributes, equal by chance or not."""

    def __init__(self, num_heads=2, d_k=4, v_head_dim=4, shared=False):
        super().__init__()
        self.num_heads, self.d_k, self.v_head_dim = num_heads, d_k, v_head_dim
        self.inner_dim = num_heads * v_head_dim
        self.head_dim = 4  # of no use where it is not shared
        self.shared = shared
        self.scale = d_k**-0.5
        self.q, self.k = nn.Linear(6, num_heads * d_k), nn.Linear(6, num_heads * d_k)
        self.v, self.o = nn.Linear(6, num_heads * v_head_dim), nn.Linear(num_heads * v_head_dim, 6)

    def forward(self, x):
        b, t, _ = x.shape
        if self.shared:
            q = self.q(x).view(b, t, self.num_heads, self.head_dim).transpose(1, 2)
            k = self.k(x).view(b, t, self.num_heads, self.head_dim).transpose(1, 2)
            v = self.v(x).view(b, t, self.num_heads, self.head_dim).transpose(1, 2)
        else:
            q = self.q(x).view(b, t, self.num_heads, self.d_k).transpose(1, 2)
            k = self.k(x).view(b, t, self.num_heads, self.d_k).transpose(1, 2)
            v = self.v(x).view(b, t, self.num_heads, self.v_head_dim).transpose(1, 2)
        weights = torch.softmax(q @ k.transpose(-1, -2) * self.scale, -1)
        return self.o((weights @ v).transpose(1, 2).reshape(b, t, self.inner_dim))


class Net(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.att, self.down = nn.Linear(5, 6), Attention(**settings), nn.Linear(6, 3)
        self.double()

    def forward(self, x):
        return self.down(self.att(torch.relu(self.up(x))))


X = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def group_of(structure, tensor, num_channels=None):
    found = [g for g in structure.groups if g.pin is None and any(m.tensor == tensor and m.dim == 0 for m in g.members)]
    return next(g for g in found if num_channels in (None, g.num_channels))


def silence_(net, group, gone):
    """Give the channels no effect at the group's linear sites, or at the queries where they are multiplied."""
    with torch.no_grad():
        named = dict(net.named_parameters())
        for site in group.sites:
            if site.kind != "product":
                named[site.weight].movedim(site.dim, -1)[..., site.columns[gone].reshape(-1)] = 0.0
        if any(site.kind == "product" for site in group.sites):
            for m in group.members:
                if m.tensor.startswith("att.q."):
                    named[m.tensor][m.positions[gone].reshape(-1)] = 0.0


def remove(net, nets, group, structure, gone, averaged_models=()):
    keep = [c for c in range(group.num_channels) if c not in gone]
    silence_(net, group, gone)
    before = net(X).detach()
    edits = build_edits(structure, [nets.reduction(group, keep)])
    with Transaction(net, averaged_models=averaged_models) as transaction:
        transaction.apply(edits, structure)
        new = analyse(net, (X,), {})
        verify(structure, new, {e.tensor: e.keep for e in edits})
    assert (net(X) - before).abs().max() < 1e-12
    return new


def test_values_and_queries_narrow_by_names_of_their_own(nets, tmp_path):
    net = Net()  # both sizes are 4, as are others: the lines that make the grids tell which is which
    follower = copy.deepcopy(net)
    structure = analyse(net, (X,), {})
    new = remove(net, nets, group_of(structure, "att.v.weight", 8), structure, [1, 6], [follower])
    assert (net.att.v_head_dim, net.att.inner_dim, net.att.d_k, net.att.num_heads) == (3, 6, 4, 2)
    assert attributes_of(follower.att) == attributes_of(net.att)
    assert follower(X).shape == net(X).shape
    new = remove(net, nets, group_of(new, "att.q.weight", 8), new, [0, 3, 4, 7])
    assert (net.att.v_head_dim, net.att.d_k, net.att.q.out_features) == (3, 2, 4)
    save(tmp_path / "a", net)
    fresh = Net()
    load(tmp_path / "a", fresh)
    assert fresh(X).equal(net(X))
    assert attributes_of(fresh.att) == attributes_of(net.att)
    assert (fresh.att.d_k, fresh.att.inner_dim) == (2, 6)


def test_whole_heads_go_and_their_number_follows(nets):
    net = Net(num_heads=4, d_k=4, v_head_dim=3)
    structure = analyse(net, (X,), {})
    heads = group_of(structure, "att.v.weight", 4)
    remove(net, nets, heads, structure, [2])
    assert (net.att.num_heads, net.att.d_k, net.att.v_head_dim, net.att.inner_dim) == (3, 4, 3, 9)


def test_one_attribute_for_two_grids_is_refused_and_nothing_has_changed(nets):
    net = Net(shared=True)
    structure = analyse(net, (X,), {})
    group = group_of(structure, "att.v.weight", 8)
    before, attributes = net(X).detach(), attributes_of(net.att)
    edits = build_edits(structure, [nets.reduction(group, [0, 1, 2, 4, 5, 6])])
    with (
        pytest.raises(ShapeError, match=r"'head_dim' of Attention .* 3 and 4 at once"),
        Transaction(net) as transaction,
    ):
        transaction.apply(edits, structure)
    assert net(X).equal(before)
    assert attributes_of(net.att) == attributes
    both = [nets.reduction(group_of(structure, f"att.{n}.weight", 8), [0, 1, 2, 4, 5, 6]) for n in ("q", "v")]
    with Transaction(net) as transaction:
        transaction.apply(build_edits(structure, both), structure)
    assert (net.att.head_dim, net.att.inner_dim) == (3, 6)
    assert net(X).shape == before.shape


def test_a_rollback_puts_the_numbers_back(nets):
    net = Net()
    structure = analyse(net, (X,), {})
    before, attributes = net(X).detach(), attributes_of(net.att)
    with Transaction(net) as transaction:
        reduction = nets.reduction(group_of(structure, "att.v.weight", 8), [0, 5])
        transaction.apply(build_edits(structure, [reduction]), structure)
        assert net.att.v_head_dim == 1
        transaction.rollback()
    assert attributes_of(net.att) == attributes
    assert net(X).equal(before)


@pytest.mark.parametrize(
    ("attributes", "changes", "expected"),
    [
        ({"num_heads": 4, "head_dim": 4}, [((4, 4), (3, 4))], {"num_heads": 3}),
        ({"num_heads": 4, "head_dim": 4}, [((4, 4), (4, 3))], {"head_dim": 3}),
        ({"num_heads": 4, "all_head_size": 32, "hidden_size": 32}, [((12, 8), (9, 8))],
         {"num_heads": 3, "all_head_size": 24, "hidden_size": 24}),  # queries, keys and values in one
        ({"num_kv_heads": 4, "num_heads": 12}, [((12, 8), (9, 8)), ((4, 8), (3, 8))],
         {"num_kv_heads": 3, "num_heads": 9}),
        ({"num_kv_heads": 4, "num_heads": 12}, [((12, 8), (12, 6)), ((4, 8), (4, 6))], {}),
        ({"split_size": 16, "hidden_size": 16}, [((2, 16), (2, 12))], {"split_size": 12}),
        ({"inner_dim": 16, "hidden_size": 8}, [((2, 8), (2, 6))], {"inner_dim": 12}),
        ({"num_features": 6, "num_groups": 6}, [((1, 6), (1, 4))], {"num_features": 4, "num_groups": 4}),
        ({"width": 8, "head_dim": 8.0, "n_heads": True, "heads": 2}, [((2, 8), (1, 6))], {"heads": 1}),
        ({"head_dim": 8}, [((2, 8), (2, 6)), ((4, 8), (4, 8))], {"head_dim": 6}),
        ({"head_dim": 4, "num_heads": 4}, [((4, 4), (3, 4)), ((1, 4), (1, 3))], {"num_heads": 3}),
        ({"head_dim": 5}, [((2, 8), (2, 6))], {}),
    ],
)  # fmt: skip
def test_names_say_what_a_number_counts(attributes, changes, expected):
    module = nn.Module()
    vars(module).update(attributes)
    found = followed(module, [SplitChange(module="m", old=old, new=new) for old, new in changes])
    assert found == expected


def test_two_new_numbers_for_one_attribute_are_refused():
    module = nn.Module()
    module.head_dim = 8
    changes = [SplitChange(module="m", old=(2, 8), new=(2, n), where="nowhere.py:3") for n in (5, 6)]
    with pytest.raises(ShapeError, match="5 and 6 at once"):
        followed(module, changes)


def structure_with(*grids: list[list[int]]) -> Structure:
    splits = tuple(Split(module="m", classes=np.array(g), where="a.py:1") for g in grids)
    return Structure(groups=(), macs=0.0, shapes={"w": (4,)}, classes={"w": (np.arange(4),)}, splits=splits)


def test_grids_follow_the_classes_that_stay():
    structure = structure_with([[0, 1], [2, 3]], [[0, 0], [9, 9]])
    edit = TensorEdit(tensor="w", keep={0: torch.tensor([1, 3])})
    changes = split_changes(structure, [edit])["m"]
    assert [(c.old, c.new) for c in changes] == [((2, 2), (2, 1)), ((2, 2), (1, 2))]
    whole = replace(edit, keep={0: torch.tensor([2, 3])})
    assert split_changes(structure_with([[0, 1], [2, 3]]), [whole])["m"][0].new == (1, 2)
    lone = structure_with([[0, 1]], [[2, 3]])  # two heads, a channel of each in every row
    assert split_changes(lone, [edit]) == {"m": (SplitChange(module="m", old=(1, 2), new=(1, 1), where="a.py:1"),)}
    assert split_changes(lone, [replace(edit, keep={0: torch.tensor([0, 3])})]) == {}
    assert split_changes(lone, [replace(edit, keep={0: torch.tensor([2, 3])})]) == {}
    assert split_changes(structure, [TensorEdit(tensor="w", keep={})]) == {}
    assert split_changes(structure, [TensorEdit(tensor="unknown", keep={0: torch.tensor([0])})]) == {}


def test_uneven_grids_are_refused():
    edit = TensorEdit(tensor="w", keep={0: torch.tensor([0, 1, 2])})
    with pytest.raises(ShapeError, match=r"'m' splits channels into rows of equal length \(a\.py:1\)"):
        split_changes(structure_with([[0, 1], [2, 3]]), [edit])


class Halves(nn.Module):
    """A gate whose halves are cut by an attribute."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.d_inner, self.up, self.down = 6, nn.Linear(5, 12), nn.Linear(6, 2)
        self.double()

    def forward(self, x):
        a, b = self.up(x).split(self.d_inner, -1)
        return self.down(F.silu(a) * b)


def test_equal_parts_follow(nets):
    net = Halves()
    structure = analyse(net, (X,), {})
    remove(net, nets, group_of(structure, "up.weight"), structure, [1, 2])
    assert (net.d_inner, net.up.out_features, net.down.in_features) == (4, 8, 4)


@pytest.mark.parametrize("norm", [nn.InstanceNorm1d(6), nn.GroupNorm(6, 6, affine=False), nn.GroupNorm(6, 6)])
def test_norms_without_weights_follow(norm, nets):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(7, 6, 3), norm, nn.ReLU(), nn.Conv1d(6, 2, 1)).double()
    structure = analyse(net, (X,), {})
    remove(net, nets, group_of(structure, "0.weight"), structure, [1, 2])
    assert attributes_of(net[1]).get("num_features", 4) == 4
    assert attributes_of(net[1]).get("num_groups", 4) == attributes_of(net[1]).get("num_channels", 4) == 4


def test_the_vocabulary_reads_each_name_in_one_way():
    assert all(name.isidentifier() and len(set(kinds)) == len(kinds) for name, kinds in VOCABULARY.items())
    assert {"head_dim", "num_heads", "num_key_value_heads", "all_head_size", "inner_dim"} <= VOCABULARY.keys()


class Remembers(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 2)

    def forward(self, x):
        self.h = x.shape[0]
        return self.fc(x)


def test_numbers_that_a_forward_pass_sets_hinder_no_loading(tmp_path):
    net, fresh = Remembers(), Remembers()
    x = torch.randn(3, 2)
    net(x)
    save(tmp_path / "a", net)
    load(tmp_path / "a", fresh)
    assert not hasattr(fresh, "h")
    assert fresh(x).equal(net(x))


@pytest.mark.parametrize(
    ("sizes", "old", "new", "want"),
    [
        ((12, 2, 2), (24, 2), (20, 2), (10, 2, 2)),
        ((12, 4), (12, 4), (9, 4), (9, 4)),
        ((2, 4), (2, 4), (2, 3), (2, 3)),
        ((2, 4, 3), (8, 3), (6, 3), (2, 3, 3)),
        ((12, -1), (12, 4), (9, 4), (9, -1)),
        ((-1, 4), (12, 4), (9, 4), None),
        ((6,), (2, 4), (2, 3), None),
        ((2, 4), (8, 1), (7, 1), None),
    ],
)
def test_sizes_of_an_unflatten_follow(sizes, old, new, want) -> None:
    found = followed(nn.Unflatten(1, sizes), [SplitChange(module="", old=old, new=new)])
    assert found == ({} if want is None else {"unflattened_size": want})


def test_a_network_with_an_unflatten_shrinks_and_loads(tmp_path) -> None:
    def build() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 24), nn.ReLU(), nn.Unflatten(1, (6, 2, 2)), nn.Conv2d(6, 2, 1)).double()

    model, x = build(), torch.randn(64, 5, dtype=torch.float64)
    with torch.no_grad():
        model[0].weight[20:] = model[0].weight[4:8]
        model[0].bias[20:] = model[0].bias[4:8]
        want = model(x)
    event = shrink_(model, x[:2], [x], tolerance=0)
    assert event.groups == {"0": (6, 5)}
    assert model[2].unflattened_size == (5, 2, 2)
    torch.testing.assert_close(model(x), want)
    save(tmp_path / "small.apo", model)
    fresh = build()
    load(tmp_path / "small.apo", fresh)
    torch.testing.assert_close(fresh(x), want)
