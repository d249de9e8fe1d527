"""A network and data of your own for the command:

apoptosis train --model own_work:network --data own_work:data --epochs 40 --batch 32

run in this folder. `network` is called anew for every run. A parameter called `shape` is told the shape of an example,
one called `num_classes` the number of classes (1 for values); others get what --kwargs says: '{"hidden": 256}'.
`data` takes no arguments and returns a dataset, which is split; or a pair (training, test), or three (training,
validation, test), of datasets or DataLoaders; or two arrays, inputs and labels. Labels that are whole numbers are
classes from 0, floating-point numbers are values.
"""

import torch
from sklearn.datasets import load_wine
from torch import nn
from torch.utils.data import Dataset


class Wine(Dataset):
    """Anything with a length whose items are (input, label)."""

    def __init__(self, rows: slice) -> None:
        table, labels = load_wine(return_X_y=True)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        x = torch.tensor(table, dtype=torch.float32)[order]
        self.x = ((x - x[:140].mean(0)) / x[:140].std(0))[rows]
        self.y = torch.tensor(labels)[order][rows]
        self.training = rows.start is None

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        noise = 0.1 * torch.randn(self.x.shape[1]) if self.training else 0.0  # drawn anew for every batch
        return self.x[row] + noise, self.y[row]


def data() -> tuple[Dataset, Dataset]:
    return Wine(slice(None, 140)), Wine(slice(140, 178))


def network(shape: tuple[int, ...], num_classes: int, hidden: int = 512) -> nn.Module:
    return nn.Sequential(
        nn.Linear(shape[0], hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, num_classes)
    )
