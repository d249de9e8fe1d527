"""Sites that read several positions: errors on the sample against the real module, before and after a fold."""

import copy

import pytest
import torch
from torch import nn

from apoptosis.graph import analyse
from apoptosis.observe.linear_map import SampledSite, gather_weight, make_respond, num_blocks
from apoptosis.records import Reduction, SiteReduction
from apoptosis.surgery import Transaction, build_edits


def networks():
    after = {
        "linear": (nn.Linear(8, 5), None),
        "flatten": (nn.Linear(8 * 16, 5), "flat"),
        "conv1x1": (nn.Conv2d(8, 5, 1), None),
        "conv": (nn.Conv2d(8, 5, 3), None),
        "padded": (nn.Conv2d(8, 5, 3, padding=1), None),
        "same": (nn.Conv2d(8, 5, (2, 4), padding="same"), None),
        "circular": (nn.Conv2d(8, 5, 3, padding=1, padding_mode="circular"), None),
        "reflect": (nn.Conv2d(8, 5, 3, padding=1, padding_mode="reflect"), None),
        "strided": (nn.Conv2d(8, 5, 2, stride=2), None),
        "dilated": (nn.Conv2d(8, 5, 2, dilation=2), None),
        "grouped": (nn.Conv2d(8, 6, 3, groups=2, padding=1), None),
        "grouped1x1": (nn.Conv2d(8, 6, 1, groups=2), None),
        "transposed": (nn.ConvTranspose2d(8, 5, 3, stride=2, padding=1, output_padding=1), None),
        "transposed_grouped": (nn.ConvTranspose2d(8, 6, 2, groups=2), None),
        "unbiased": (nn.Conv2d(8, 5, 3, bias=False), None),
    }
    for name, (module, flat) in after.items():
        if name == "linear":
            yield name, nn.Sequential(nn.Linear(6, 8), nn.Tanh(), module), (6,)
        else:
            body = [nn.Conv2d(2, 8, 3), nn.Tanh(), *([nn.Flatten()] if flat else []), module]
            yield name, nn.Sequential(*body), (2, 6, 6)
    yield "conv1d", nn.Sequential(nn.Conv1d(2, 8, 3), nn.Tanh(), nn.Conv1d(8, 5, 3, padding=1)), (2, 9)
    yield (
        "conv3d",
        nn.Sequential(nn.Conv3d(1, 8, 2), nn.Tanh(), nn.Conv3d(8, 3, 2, stride=2, padding=1)),
        (1, 4, 4, 4),
    )
    yield (
        "transposed1d",
        nn.Sequential(nn.Conv1d(2, 8, 3), nn.Tanh(), nn.ConvTranspose1d(8, 3, 3, dilation=2)),
        (2, 9),
    )


CASES = {name: (net, shape) for name, net, shape in networks()}


def reduction(group, with_offset):
    """Some channels stand in for the rest, in no good way at all: the measure has to be right for any mix."""
    generator = torch.Generator().manual_seed(3)
    channels = group.num_channels
    keep = torch.arange(0, channels, 2)
    mix = torch.randn(len(keep), channels, generator=generator, dtype=torch.float64) * 0.3
    mix[:, keep] = torch.eye(len(keep), dtype=torch.float64)
    offset = None
    if with_offset:
        offset = torch.randn(channels, generator=generator, dtype=torch.float64)
        offset[keep] = 0.0
    return Reduction(
        group=group.name, keep=keep, sites={s.key: SiteReduction(mix=mix, offset=offset) for s in group.sites}
    )


@pytest.mark.filterwarnings("ignore:Using padding=.same.")
@pytest.mark.parametrize("name", CASES)
def test_error_is_what_the_folded_module_does(runs, name):
    net, shape = copy.deepcopy(CASES[name])
    torch.manual_seed(1)
    net = net.double()
    x = runs.inputs(12, 5, shape).double()
    structure = analyse(net, (x[:3],))
    group = next(g for g in structure.groups if g.pin is None)
    (site,) = group.sites
    module = net.get_submodule(site.module)
    taken = []
    module.register_forward_pre_hook(lambda m, args: taken.append(args[0].detach()))
    before = net(x).detach()
    sampled = SampledSite(site, taken[0], module.weight, make_respond(module, site), num_blocks(module))
    axis = before.dim() - 1 if site.kind == "linear" else 1
    over = (0,) if site.kind == "linear" else tuple(d for d in range(taken[0].dim()) if d != 1)
    with torch.no_grad():
        centred = make_respond(module, site)(taken[0] - taken[0].mean(over, keepdim=True), module.weight)
    assert sampled.scale == pytest.approx(float(centred.movedim(axis, 0).flatten(1).square().mean(1).sum()), rel=1e-9)
    plain = not site.zero_padded and site.bias is not None and site.kind != "conv_transpose"
    chosen = reduction(group, with_offset=plain)
    error = sampled.error(chosen.keep, chosen.sites[site.key])
    dropped = sampled.dropped
    with Transaction(net) as transaction:
        transaction.apply(build_edits(structure, [chosen]))
        after = net(x).detach()
    change = (after - before).movedim(axis, 0).flatten(1)
    assert error == pytest.approx(float(change.square().mean(1).sum()), rel=1e-9)
    old, new = before.movedim(axis, 0).flatten(1), after.movedim(axis, 0).flatten(1)
    assert torch.allclose(dropped, old.var(1, correction=0) - new.var(1, correction=0), atol=1e-9)


@pytest.mark.filterwarnings("ignore:Using padding=.same.")
@pytest.mark.parametrize("name", [n for n in CASES if n not in ("linear", "conv1x1", "grouped1x1")])
def test_folding_exact_duplicates_is_exact_whatever_the_borders(runs, name):
    net, shape = copy.deepcopy(CASES[name])
    net = net.double()
    x = runs.inputs(6, 5, shape).double()
    structure = analyse(net, (x[:3],))
    group = next(g for g in structure.groups if g.pin is None)
    half = group.num_channels // 2
    producer = group.members[0]
    with torch.no_grad():
        for leaf in (net[0].weight, net[0].bias):
            leaf[producer.positions[half:, 0]] = leaf[producer.positions[:half, 0]]
    if group.num_channels == 4:  # two blocks: a channel of the group is a pair
        half = 2
        with torch.no_grad():
            for leaf in (net[0].weight, net[0].bias):
                leaf[producer.positions[half:].reshape(-1)] = leaf[producer.positions[:half].reshape(-1)]
    before = net(x).detach()
    mix = torch.cat([torch.eye(half), torch.eye(half)], 1).double()
    sites = {s.key: SiteReduction(mix=mix, offset=None) for s in group.sites}
    (site,) = group.sites
    module = net.get_submodule(site.module)
    taken = []
    module.register_forward_pre_hook(lambda m, args: taken.append(args[0].detach()))
    net(x)
    sampled = SampledSite(site, taken[0], module.weight, make_respond(module, site), num_blocks(module))
    assert sampled.error(torch.arange(half), sites[site.key]) < 1e-24
    with Transaction(net) as transaction:
        transaction.apply(build_edits(structure, [Reduction(group=group.name, keep=torch.arange(half), sites=sites)]))
    assert torch.allclose(net(x), before, rtol=0, atol=1e-12)


def test_nothing_removed_costs_nothing(runs):
    net, shape = copy.deepcopy(CASES["conv"])
    structure = analyse(net, (runs.inputs(3, 0, shape),))
    group = next(g for g in structure.groups if g.pin is None)
    (site,) = group.sites
    sample = runs.inputs(3, 0, (8, 4, 4))
    sampled = SampledSite(site, sample, net[2].weight, make_respond(net[2], site), 1)
    everything = SiteReduction(mix=torch.eye(8).double(), offset=None)
    assert sampled.error(torch.arange(8), everything) == 0.0
    assert sampled.dropped is None


def test_other_modules_have_no_linear_map(runs):
    net, shape = copy.deepcopy(CASES["conv"])
    structure = analyse(net, (runs.inputs(3, 0, shape),))
    (site,) = next(g for g in structure.groups if g.pin is None).sites
    with pytest.raises(TypeError, match="Tanh"):
        make_respond(net[1], site)


def test_gathered_weights_put_taps_and_columns_side_by_side(runs):
    net, shape = copy.deepcopy(CASES["flatten"])
    structure = analyse(net, (runs.inputs(3, 0, shape),))
    (site,) = next(g for g in structure.groups if g.pin is None).sites
    found = gather_weight(site, net[3].weight)
    assert torch.equal(found, net[3].weight.detach().double().reshape(5, 8, 16))
    net, shape = copy.deepcopy(CASES["conv"])
    structure = analyse(net, (runs.inputs(3, 0, shape),))
    (site,) = next(g for g in structure.groups if g.pin is None).sites
    assert torch.equal(gather_weight(site, net[2].weight), net[2].weight.detach().flatten(2))
