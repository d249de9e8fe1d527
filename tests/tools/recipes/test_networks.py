"""Reference networks: shapes, sizes, refusals."""

import pytest
import torch
from torch import nn

from apoptosis.errors import ArgumentError
from apoptosis.tools.recipes.networks import ACTIVATIONS, NETWORKS, build_network, num_macs, num_parameters

SMALL = {"mlp": (8, 8), "cnn": (4, 4, 8), "vgg": (4, 4, 8), "resnet": (4, 8), "alexnet": (4, 4, 4, 8, 8)}


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32)])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_maps_every_image_size_to_logits(name, shape):
    model = build_network(name, shape, 7, widths=SMALL.get(name), dropout=0.1)
    assert model(torch.randn(2, *shape)).shape == (2, 7)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_is_used(activation):
    model = build_network("mlp", (5,), 2, widths=(4, 4), activation=activation)
    assert sum(type(m) is ACTIVATIONS[activation] for m in model.modules()) == 2


def test_default_sizes():
    mlp = build_network("mlp", (1, 28, 28), 10)
    assert num_parameters(mlp) == 784 * 1024 + 1024 + 2 * (1024 * 1024 + 1024) + 1024 * 10 + 10
    assert num_macs(mlp, (1, 28, 28)) == 784 * 1024 + 2 * 1024 * 1024 + 1024 * 10
    cnn = build_network("cnn", (3, 32, 32), 10)
    linear = [m for m in cnn.modules() if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == [(256 * 4 * 4, 256), (256, 10)]
    convolutions = 9 * (3 * 64 * 32**2 + 64 * 128 * 16**2 + 128 * 256 * 8**2)
    assert num_macs(cnn, (3, 32, 32)) == convolutions + 256 * 16 * 256 + 256 * 10
    kinds = [type(m) for m in cnn][:4]
    assert kinds == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d]


def test_counting_macs_leaves_no_trace():
    model = build_network("cnn", (1, 8, 8), 3, widths=(4, 8))
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    num_macs(model, (1, 8, 8))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"name": "mpl"}, "unknown network 'mpl'; there are mlp"),
        ({"name": "mlp", "widths": (8, 0)}, "at least 1; given: 8,0"),
        ({"name": "cnn", "widths": (8,)}, "at least 2 widths"),
        ({"name": "mlp", "widths": ()}, "given: none"),
        ({"name": "mlp", "activation": "rleu"}, "unknown activation 'rleu'"),
        ({"name": "cnn", "shape": (28,)}, "reads images; these data have 28 features"),
    ],
)
def test_refusals(arguments, what):
    with pytest.raises(ArgumentError, match=what):
        build_network(**{"shape": (1, 8, 8), "num_classes": 2, **arguments})
