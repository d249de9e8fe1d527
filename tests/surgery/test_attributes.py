from __future__ import annotations

import pytest
import torch
from torch import nn

from apoptosis.errors import ShapeError
from apoptosis.records import TensorEdit
from apoptosis.surgery import Transaction
from apoptosis.surgery.attributes import ATTRIBUTES, attributes_of


class MyLinear(nn.Linear):
    """A subclass goes by its parent's rows."""


def _example(kind: type[nn.Module]) -> nn.Module:
    made = {
        nn.Linear: lambda: MyLinear(5, 5),
        nn.Bilinear: lambda: nn.Bilinear(5, 5, 5),
        nn.modules.conv._ConvNd: lambda: nn.Conv2d(5, 5, 3),
        nn.modules.conv._ConvTransposeNd: lambda: nn.ConvTranspose1d(5, 5, 3),
        nn.modules.batchnorm._NormBase: lambda: nn.BatchNorm2d(5),
        nn.GroupNorm: lambda: nn.GroupNorm(1, 5),
        nn.LayerNorm: lambda: nn.LayerNorm((5, 5, 5)),
        nn.RMSNorm: lambda: nn.RMSNorm((5, 5, 5)),
        nn.PReLU: lambda: nn.PReLU(5),
        nn.Embedding: lambda: nn.Embedding(5, 5),
        nn.EmbeddingBag: lambda: nn.EmbeddingBag(5, 5),
    }
    return made[kind]()


@pytest.mark.parametrize("row", ATTRIBUTES, ids=lambda row: f"{row[0].__name__}.{row[1]}.{row[2]}")
def test_every_row_of_the_attribute_table(row):
    kind, leaf, dim, attribute, _ = row
    module = _example(kind)
    with Transaction(module) as transaction:
        transaction.apply([TensorEdit(tensor=leaf, keep={dim: torch.tensor([0, 2, 3])})])
    value = getattr(module, attribute)
    assert (value[dim] if isinstance(value, tuple) else value) == 3
    other = {k: v for k, v in attributes_of(module).items() if k not in (attribute, "groups", "num_groups")}
    assert all(v == 5 or v == (5, 5, 5) for v in other.values())
    assert repr(module)


def test_unaffine_batch_norm_goes_by_its_buffers():
    module = nn.BatchNorm1d(5, affine=False)
    keep = {0: torch.tensor([1, 4])}
    with Transaction(module) as transaction:
        transaction.apply([TensorEdit(tensor=n, keep=keep) for n in ("running_mean", "running_var")])
    assert module.num_features == 2
    assert module(torch.randn(6, 2)).shape == (6, 2)


@pytest.mark.parametrize(
    ("module", "keep", "shape"),
    [
        (nn.Conv2d(6, 6, 3, groups=6), {0: [0, 2, 5]}, (3, 3, 3)),  # depthwise
        (nn.Conv2d(4, 8, 3, groups=4), {0: [2, 3, 6, 7]}, (2, 4, 2)),  # two outputs per input, whole groups go
        (nn.Conv2d(4, 8, 3, groups=4), {0: [0, 2, 4, 6]}, (4, 4, 4)),  # one output of each input goes
        (nn.Conv2d(6, 6, 3, groups=2), {0: [0, 2, 3, 5]}, (6, 4, 2)),
        (nn.Conv2d(6, 6, 3, groups=2), {1: [0, 2]}, (4, 6, 2)),
        (nn.ConvTranspose2d(6, 6, 3, groups=6), {0: [1, 2]}, (2, 2, 2)),
        (nn.ConvTranspose2d(6, 4, 3, groups=2), {0: [0, 1, 3, 4]}, (4, 4, 2)),
        (nn.ConvTranspose2d(6, 4, 3, groups=2), {1: [1]}, (6, 2, 2)),
    ],
)
def test_grouped_convolutions_stay_true(module, keep, shape):
    edits = [TensorEdit(tensor="weight", keep={d: torch.tensor(k) for d, k in keep.items()})]
    num_out = shape[1]
    edits.append(TensorEdit(tensor="bias", keep={0: torch.arange(num_out)}))
    with Transaction(module) as transaction:
        transaction.apply(edits)
    assert (module.in_channels, module.out_channels, module.groups) == shape
    assert module(torch.randn(2, module.in_channels, 5, 5)).shape[1] == module.out_channels
    fresh = type(module)(*shape[:2], 3, groups=shape[2])
    assert fresh.weight.shape == module.weight.shape


def test_ragged_groups_are_refused():
    module = nn.Conv2d(6, 6, 3, groups=2)
    with pytest.raises(ShapeError, match="different sizes"), Transaction(module) as transaction:
        transaction.apply([TensorEdit(tensor="weight", keep={0: torch.tensor([0, 1, 2, 3])})])
    assert module.weight.shape == (6, 3, 3, 3)
