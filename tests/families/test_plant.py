"""What is planted is exactly redundant where it is read, in both modes."""

import pytest
import torch

from apoptosis.graph import analyse
from families.family import Family
from families.oracle import build, inputs, quiet, run, structure_of
from families.plant import enliven, kinds_of, pairs, plant, settle
from families.registry import FAMILIES

NAMES = [
    "MLP",
    "LeNet",
    "VGG, batch norm",
    "ResNet, basic blocks",
    "ResNeXt",
    "DenseNet",
    "MobileNetV3",
    "U-Net, transposed",
]
FACTORS = {"duplicate": 1.0, "scale": 2.0, "negate": -1.0, "zero": 0.0}


def prepared(name):
    family = FAMILIES[name]
    model = build(family, torch.float64)
    quiet(model)
    x = inputs(family, torch.float64, 1, rows=16)
    settle(model, lambda: run(family, model, x))
    return family, model, x


def site_inputs(family, model, group, x):
    """What every site of a group reads, channel by channel: (..., channels, positions)."""
    found, handles = [], []
    for site in group.sites:
        dim = -1 if site.kind == "linear" else 1

        def hook(module, args, site=site, dim=dim):
            found.append(args[0].movedim(dim, -1)[..., torch.as_tensor(site.input_columns)])

        handles.append(model.get_submodule(site.module).register_forward_pre_hook(hook))
    with torch.no_grad():
        run(family, model, x)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("training", [False, True])
def test_planted_channels_are_what_they_are_called(name, training):
    family, model, x = prepared(name)
    structure = structure_of(family, model, x)
    groups = {group.name: group for group in structure.groups}
    for index, (group_name, num) in enumerate(family.groups.items()):
        plant(model, structure, group_name, num, seed=index)
    model.train(training)
    for index, (group_name, num) in enumerate(family.groups.items()):
        group = groups[group_name]
        kinds = kinds_of(group)
        read = site_inputs(family, model, group, x)
        assert read
        for number, (victim, source) in enumerate(pairs(group, num // group.rows, index)):
            factor = FACTORS[kinds[(number + index) % len(kinds)]]
            for z in read:
                torch.testing.assert_close(z[..., victim, :], factor * z[..., source, :], rtol=1e-12, atol=1e-12)


def test_every_kind_is_planted_somewhere():
    found = set()
    for name in NAMES:
        family = FAMILIES[name]
        structure = structure_of(family, build(family, torch.float64), inputs(family, torch.float64, 1, rows=4))
        found |= {kind for group in structure.groups if group.name in family.groups for kind in kinds_of(group)}
    assert found == set(FACTORS)


def test_max_pooling_and_biased_norms_limit_the_kinds():
    def group(*layers):
        net = torch.nn.Sequential(*layers)
        return analyse(net, (torch.randn(2, 2, 6, 6),), {}).groups[0]

    conv, last = torch.nn.Conv2d(2, 4, 3), torch.nn.Conv2d(4, 3, 1)
    assert kinds_of(group(conv, torch.nn.Tanh(), last)) == ("duplicate", "negate", "zero")
    assert kinds_of(group(conv, torch.nn.Tanh(), torch.nn.MaxPool2d(2), last)) == ("duplicate", "zero")
    assert kinds_of(group(conv, torch.nn.Sigmoid(), last)) == ("duplicate",)
    assert kinds_of(group(conv, torch.nn.BatchNorm2d(4, affine=False), torch.nn.ReLU(), last)) == ("duplicate",)


def test_refusals():
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    structure = analyse(net, (torch.randn(2, 3),), {})
    with pytest.raises(KeyError, match="no group 'x'"):
        plant(net, structure, "x", 1)
    with pytest.raises(ValueError, match="pinned"):
        plant(net, structure, "2", 1)
    with pytest.raises(ValueError, match="cannot be planted"):
        plant(net, structure, "0", 4)


def test_enliven_leaves_no_constant_parameter():
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.LayerNorm(4))
    torch.nn.init.zeros_(net[0].bias)
    enliven(net)
    assert all(float(p.detach().std()) > 0 for p in net.parameters())


def test_settled_statistics_are_near_those_of_the_data_but_not_equal():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 6), torch.nn.BatchNorm1d(6))
    x = torch.randn(64, 3)
    family = Family(name="one", build=lambda: net, example=lambda rows: x, groups={"0": 1})
    net.train()
    settle(net, lambda: run(family, net, x))
    hidden = net[0](x)
    assert net[1].momentum == 0.1
    assert not torch.allclose(net[1].running_mean, hidden.mean(0))
    assert torch.allclose(net[1].running_mean, hidden.mean(0), atol=float(0.2 * hidden.detach().std()))
    assert bool((hidden.mean(0).abs() < 0.3 * hidden.std(0)).all())
