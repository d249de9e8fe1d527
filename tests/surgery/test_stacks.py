"""Weights that lie in a stack, each slice of which is read on its own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from apoptosis.errors import ShapeError
from apoptosis.records import Group, Member, Reduction, SiteReduction, Structure
from apoptosis.surgery import Transaction, build_edits


def structure_of(nets, net, *groups):
    return Structure(groups=groups, macs=0.0, shapes=nets.shapes(net))


class Experts(nn.Module):
    """Every expert reads everything; weights lie in stacks."""

    def __init__(self, transposed=False, bias=True):
        super().__init__()
        torch.manual_seed(1)
        self.transposed = transposed
        self.up = nn.Parameter(torch.randn(3, 6, 4, dtype=torch.float64))
        down = torch.randn(3, 5, 6, dtype=torch.float64)
        self.down = nn.Parameter(down.mT.contiguous() if transposed else down)
        self.bias = nn.Parameter(torch.randn(3, 5, dtype=torch.float64)) if bias else None

    def forward(self, x):
        outs = []
        for e in range(3):
            z = torch.relu(x @ self.up[e].T)
            w = self.down[e].T if self.transposed else self.down[e]
            outs.append(F.linear(z, w, None if self.bias is None else self.bias[e]))
        return torch.stack(outs)


def experts_structure(nets, net: Experts) -> Structure:
    own, dim = np.arange(6, dtype=np.int64)[:, None], 1 if net.transposed else 2
    sites = tuple(
        nets.linear_site("", own, 6, weight="down", dim=dim, bias="bias", functional=True, select=((0, e),))
        if net.bias is not None
        else nets.linear_site("", own, 6, weight="down", dim=dim, bias=None, functional=True, select=((0, e),))
        for e in range(3)
    )
    members = (Member(tensor="up", dim=1, positions=own, role="producer"),)
    return structure_of(nets, net, Group(name="up", num_channels=6, members=members, sites=sites))


@pytest.mark.parametrize("transposed", [False, True])
def test_every_slice_of_a_stack_is_folded_in_its_own_way(transposed, nets):
    net = Experts(transposed)
    keep, gone = [0, 2, 4, 5], [1, 3]
    with torch.no_grad():
        for e, c in enumerate((2.0, 0.5, 3.0)):  # 1 is a multiple of another channel in every expert; 3 is constant
            net.up[e, 1] = c * net.up[e, keep[e]]
            net.up[e, 3] = 0.0
    structure = experts_structure(nets, net)
    (group,) = structure.groups
    sites = {}
    for e, (site, c) in enumerate(zip(group.sites, (2.0, 0.5, 3.0), strict=True)):
        mix = nets.reduction(group, keep).sites[site.key].mix
        mix[e, 1] = c
        sites[site.key] = SiteReduction(mix=mix, offset=torch.zeros(6, dtype=torch.float64))
    assert len(sites) == 3
    x = torch.randn(9, 4, dtype=torch.float64)
    before = net(x).detach()
    net(x).square().sum().backward()
    opt = torch.optim.Adam(net.parameters())
    opt.step()
    with torch.no_grad():
        for e, c in enumerate((2.0, 0.5, 3.0)):
            net.up[e, 1] = c * net.up[e, keep[e]]
            net.up[e, 3] = 0.0
    before = net(x).detach()
    second = opt.state[net.down]["exp_avg_sq"].clone()
    with Transaction(net, [opt]) as transaction:
        reduction = Reduction(group="up", keep=torch.tensor(keep), sites=sites)
        transaction.apply(build_edits(structure, [reduction]))
    assert net.up.shape == (3, 4, 4)
    assert (net(x) - before).abs().max() < 1e-12
    dim = 1 if transposed else 2
    assert opt.state[net.down]["exp_avg_sq"].equal(second.index_select(dim, torch.tensor(keep)))
    assert gone
    net(x).square().sum().backward()
    opt.step()


@pytest.mark.parametrize("transposed", [False, True])
def test_offsets_of_a_stack_go_to_the_stacked_biases(transposed, nets):
    net = Experts(transposed)
    structure = experts_structure(nets, net)
    (group,) = structure.groups
    x = torch.randn(9, 4, dtype=torch.float64)
    offsets = torch.randn(3, 6, dtype=torch.float64)
    offsets[:, [0, 2, 4, 5]] = 0.0
    keep = torch.tensor([0, 2, 4, 5])
    plain = nets.reduction(group, keep.tolist())
    sites = {s.key: replace(plain.sites[s.key], offset=offsets[e]) for e, s in enumerate(group.sites)}
    down = net.down.detach().mT if transposed else net.down.detach()
    z = torch.relu(torch.einsum("bi,eoi->ebo", x, net.up.detach()))
    z[..., [1, 3]] = offsets[:, None, [1, 3]]
    expected = torch.einsum("ebc,eoc->ebo", z, down) + net.bias.detach()[:, None]
    with Transaction(net) as transaction:
        transaction.apply(build_edits(structure, [replace(plain, sites=sites)]))
    assert torch.allclose(net(x), expected, rtol=1e-12)


def test_offsets_of_a_stack_without_stacked_biases_are_refused(nets):
    net = Experts(bias=False)
    structure = experts_structure(nets, net)
    (group,) = structure.groups
    reduction = nets.random_reduction(group, [0, 1, 2])
    with pytest.raises(ShapeError, match="nowhere to go"):
        build_edits(structure, [reduction])
    net.shared = nn.Parameter(torch.zeros(5, dtype=torch.float64))
    sites = tuple(replace(site, bias="shared") for site in group.sites)
    structure = structure_of(nets, net, replace(group, sites=sites))
    with pytest.raises(ShapeError, match="no bias of its own"):
        build_edits(structure, [reduction])
    sites = tuple(replace(site, select=()) for site in group.sites[:1])
    structure = structure_of(nets, net, replace(group, sites=sites))
    (group,) = structure.groups
    with pytest.raises(ShapeError, match="weight of shape"):
        build_edits(structure, [nets.random_reduction(group, [0, 1, 2])])


def test_overlapping_slices_must_be_the_same(nets):
    net = Experts(bias=False)
    structure = experts_structure(nets, net)
    (group,) = structure.groups
    sites = (group.sites[0], replace(group.sites[1], select=(), module="again"))
    structure = structure_of(nets, net, replace(group, sites=sites))
    (group,) = structure.groups
    with pytest.raises(ShapeError, match="folded in two ways"):
        build_edits(structure, [nets.reduction(group, [0, 1, 2])])
