"""Products of activations and rows of equal length: folds, scales and refusals."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apoptosis.errors import ArgumentError, ShapeError
from apoptosis.records import Group, Member, ProductSite, Reduction, Structure
from apoptosis.surgery import Transaction, build_edits

HEADS, SIZE = 2, 6
FEW = [0, 2, 3, 5]  # channels of a head that stay


class Scores(nn.Module):
    """softmax-free attention scores by hand or, with values, torch's own attention; grouped queries share a key."""

    def __init__(self, own_scale=False, per_key=1, bias=True, upstream=0):
        super().__init__()
        torch.manual_seed(0)
        self.own_scale, self.per_key = own_scale, per_key
        self.up = nn.Linear(5, upstream) if upstream else None
        self.q = nn.Linear(5, HEADS * per_key * SIZE, bias=bias)
        self.k = nn.Linear(upstream or 5, HEADS * SIZE, bias=bias)
        self.double()

    def forward(self, x):
        heads = HEADS * self.per_key
        q = self.q(x).unflatten(-1, (heads, -1)).transpose(-3, -2)
        z = x if self.up is None else torch.tanh(self.up(x))
        k = self.k(z).unflatten(-1, (HEADS, -1)).transpose(-3, -2).repeat_interleave(self.per_key, -3)
        if self.own_scale:
            eye = torch.eye(x.shape[-2], dtype=x.dtype).expand(*q.shape[:-1], x.shape[-2])
            return F.scaled_dot_product_attention(q, k, eye)
        return q @ k.transpose(-1, -2) / SIZE**0.5


def product_group(net: Scores, fold: bool = True) -> Group:
    own = np.arange(HEADS * SIZE, dtype=np.int64)
    left = np.stack(
        [(own // SIZE * net.per_key + r) * SIZE + own % SIZE for r in range(net.per_key)], axis=1
    )  # the queries of one key lie side by side
    right = own[:, None]
    biased = net.k.bias is not None
    members = [
        Member(tensor="q.weight", dim=0, positions=left, role="producer"),
        Member(tensor="k.weight", dim=0, positions=right, role="producer"),
    ]
    if biased:
        members += [
            Member(tensor="q.bias", dim=0, positions=left, role="bias"),
            Member(tensor="k.bias", dim=0, positions=right, role="bias"),
        ]
    rescale = [("q.weight", 0, left)] + ([("q.bias", 0, left)] if biased else [])
    site = ProductSite(
        module="",
        weight="k.weight" if fold else "",
        dim=0,
        bias="k.bias" if fold and biased else None,
        columns=right if fold else np.zeros((HEADS * SIZE, 0), dtype=np.int64),
        input_columns=left,
        num_columns=HEADS * SIZE,
        per_sum=SIZE,
        rescale=tuple(rescale) if net.own_scale else (),
    )
    return Group(name="q", num_channels=HEADS * SIZE, members=tuple(members), sites=(site,), rows=HEADS)


def plant_(net: Scores) -> Tensor:
    """Queries 1 and 4 of every head become mixtures of the others; returns the mix that says so."""
    mix = torch.zeros(HEADS * len(FEW), HEADS * SIZE, dtype=torch.float64)
    with torch.no_grad():
        for head in range(HEADS):
            for j, parts in ((1, {0: 0.5, 3: -2.0}), (4, {2: 3.0})):
                for i, c in parts.items():
                    mix[head * len(FEW) + FEW.index(i), head * SIZE + j] = c
                for query in range(net.per_key):
                    base = (head * net.per_key + query) * SIZE
                    for p in net.q.parameters():
                        p[base + j] = sum(c * p[base + i] for i, c in parts.items())
            for i in FEW:
                mix[head * len(FEW) + FEW.index(i), head * SIZE + i] = 1.0
    return mix


def kept() -> list[int]:
    return [head * SIZE + c for head in range(HEADS) for c in FEW]


def structure_of(nets, net, *groups):
    return Structure(groups=groups, macs=0.0, shapes=nets.shapes(net))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("per_key", [1, 3])
@pytest.mark.parametrize("own_scale", [True, False])
def test_planted_queries_leave_the_scores_as_they_are(own_scale, per_key, bias, nets):
    net = Scores(own_scale, per_key, bias)
    mix, group = plant_(net), product_group(net)
    x = torch.randn(3, 7, 5, dtype=torch.float64)
    before = net(x)
    opt = torch.optim.Adam(net.parameters())
    before.square().sum().backward()
    opt.step()
    mix = plant_(net)
    before = net(x).detach()
    moments = opt.state[net.q.weight]["exp_avg_sq"].clone()
    with Transaction(net, [opt]) as transaction:
        transaction.apply(build_edits(structure_of(nets, net, group), [nets.reduction(group, kept(), mix)]))
    assert net.k.weight.shape == (HEADS * len(FEW), 5)
    assert net.q.out_features == HEADS * per_key * len(FEW)
    assert (net(x) - before).abs().max() < 1e-12 * before.abs().max()
    rows = [(h * per_key + r) * SIZE + c for h in range(HEADS) for r in range(per_key) for c in FEW]
    assert opt.state[net.q.weight]["exp_avg_sq"].equal(moments[rows])


def test_dropping_without_a_fold_is_a_slice_bitwise(nets):
    net = Scores()
    group = product_group(net, fold=False)
    q, k = net.q.weight.detach().clone(), net.k.weight.detach().clone()
    with Transaction(net) as transaction:
        transaction.apply(build_edits(structure_of(nets, net, group), [nets.reduction(group, kept())]))
    assert net.q.weight.equal(q[kept()])
    assert net.k.weight.equal(k[kept()])


def test_the_scale_follows_the_width_and_whole_rows_leave_it(nets):
    net = Scores(own_scale=True)
    group = product_group(net, fold=False)
    edits = {e.tensor: e for e in build_edits(structure_of(nets, net, group), [nets.reduction(group, kept())])}
    for name in ("q.weight", "q.bias"):
        (scale,) = edits[name].scales
        assert scale.factor == pytest.approx((len(FEW) / SIZE) ** 0.5)
    assert not edits["k.weight"].scales
    other = Scores(own_scale=True)
    site = replace(group.sites[0], rescale=group.sites[0].rescale, per_sum=SIZE)
    heads = replace(
        group, rows=1, sites=(site,)
    )  # a head goes as a whole: its sum goes, the other is as long as before
    with pytest.raises(ShapeError, match="different lengths"):
        build_edits(structure_of(nets, other, heads), [nets.reduction(heads, range(SIZE))])
    unsummed = replace(group, sites=(replace(group.sites[0], per_sum=0),))
    edits = {e.tensor: e for e in build_edits(structure_of(nets, net, unsummed), [nets.reduction(unsummed, kept())])}
    assert edits["q.weight"].scales[0].factor == pytest.approx((len(FEW) / SIZE) ** 0.5)


def test_a_sum_that_runs_over_other_channels_too_is_refused(nets):
    net = Scores(own_scale=True)
    group = product_group(net)
    wide = replace(group.sites[0], per_sum=2 * SIZE, input_columns=group.sites[0].input_columns * 2)
    group = replace(group, sites=(wide,))
    with pytest.raises(ShapeError, match="channels of other groups"):
        build_edits(structure_of(nets, net, group), [nets.reduction(group, kept())])


def test_an_offset_of_what_the_keys_read_comes_before_their_fold(nets):
    net = Scores(upstream=4)
    mix, group = plant_(net), product_group(net)
    with torch.no_grad():
        net.up.weight[2] = 0.0
    own = np.arange(4, dtype=np.int64)[:, None]
    members = (
        Member(tensor="up.weight", dim=0, positions=own, role="producer"),
        Member(tensor="up.bias", dim=0, positions=own, role="bias"),
    )
    up = Group(name="up", num_channels=4, members=members, sites=(nets.linear_site("k", own, 4),))
    offset = torch.zeros(4, dtype=torch.float64)
    offset[2] = torch.tanh(net.up.bias[2].detach())
    x = torch.randn(3, 7, 5, dtype=torch.float64)
    before = net(x).detach()
    constant = nets.reduction(up, [0, 1, 3], offset=offset)
    for order in (1, -1):
        reductions = [constant, nets.reduction(group, kept(), mix)][::order]
        with Transaction(net) as transaction:
            transaction.apply(build_edits(structure_of(nets, net, up, group), reductions))
            assert net.k.weight.shape == (HEADS * len(FEW), 3)
            assert (net(x) - before).abs().max() < 1e-12 * before.abs().max()
            transaction.rollback()
    assert net(x).equal(before)


def test_first_moments_of_merged_pairs_follow_the_chain_rule_on_the_left_alone(nets):
    net = Scores()
    group = product_group(net)
    mix = nets.reduction(group, kept()).sites[group.sites[0].key].mix
    with torch.no_grad():
        for head in range(HEADS):
            for j, i in ((1, 0), (4, 3)):
                mix[head * len(FEW) + FEW.index(i), head * SIZE + j] = 1.5
                for p in net.q.parameters():
                    p[head * SIZE + j] = 1.5 * p[head * SIZE + i]
    x = torch.randn(3, 7, 5, dtype=torch.float64)
    net(x).pow(3).sum().backward()
    with Transaction(net) as transaction:
        edits = build_edits(structure_of(nets, net, group), [nets.reduction(group, kept(), mix, merge=mix)])
        transaction.apply(edits)
    carried = {n: p.grad.clone() for n, p in net.named_parameters()}
    net.zero_grad()
    net(x).pow(3).sum().backward()
    for name, p in net.named_parameters():
        assert torch.allclose(carried[name], p.grad, rtol=1e-10), name


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda g, r: (g, replace(r, keep=r.keep[:-1])), "equally many of each of its 2 rows"),
        (lambda g, r: (replace(g, rows=5), r), "in 5 rows of equal length"),
        (lambda g, r: (g, _with(g, r, mix=torch.ones(8, 12).double())), "different rows"),
        (lambda g, r: (g, _with(g, r, offset=torch.ones(12).double())), "offset cannot be folded"),
        (lambda g, r: (_unfolded(g), _with(_unfolded(g), r, mix=_within())), "must drop channels"),
    ],
)
def test_what_a_product_refuses(change, text, nets):
    net = Scores()
    group = product_group(net)
    group, reduction = change(group, nets.reduction(group, kept()))
    with pytest.raises(ShapeError, match=text):
        build_edits(structure_of(nets, net, group), [reduction])


def _unfolded(group: Group) -> Group:
    return replace(group, sites=(replace(group.sites[0], weight="", bias=None),))


def _within() -> Tensor:
    mix = torch.zeros(8, 12, dtype=torch.float64)
    mix[0, 1] = 1.0
    return mix


def _with(group: Group, reduction: Reduction, **change: Tensor) -> Reduction:
    held = next(iter(reduction.sites.values()))
    return replace(reduction, sites={group.sites[0].key: replace(held, **change)})


def test_alternatives_are_not_changed_together(nets):
    net = nets.mlp()
    first, second = nets.mlp_structure(net).groups
    coarse = replace(first, name="heads", conflicts_with=(first.name,))
    groups = (first, second, coarse)
    reductions = [nets.reduction(g, [0, 1]) for g in groups]
    with pytest.raises(ArgumentError, match="share channels"):
        build_edits(structure_of(nets, net, *groups), reductions)
    whole = nets.reduction(first, range(first.num_channels))  # keeps everything: nothing is changed twice
    assert build_edits(structure_of(nets, net, *groups), [whole, *reductions[1:]])
