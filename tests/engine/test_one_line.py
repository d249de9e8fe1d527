"""What a user's code raises may have many lines; pins, events and errors have the first of them."""

import pytest
import torch
from torch import nn

from apoptosis import Apoptosis, shrink_
from apoptosis.errors import ArgumentError

TEXT = "the table has 16 rows\nand no more:\n  0 1 2"


class Narrow(nn.Module):
    """Cannot run without all channels of the first layer, on more examples than the example input has."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        with torch.no_grad():
            self.first.weight[8:], self.first.bias[8:] = 0.0, 0.0

    def forward(self, x):
        x = torch.relu(self.first(x))
        if len(x) > 4 and x.shape[1] != 16:
            raise ValueError(TEXT)
        return self.head(torch.relu(self.second(x)))


def test_the_pin_of_an_edit_that_fails_is_one_line():
    torch.manual_seed(0)
    event = shrink_(Narrow(), torch.randn(2, 6), [torch.randn(256, 6)], tolerance=0.01)
    note = next(note for note in event.notes if note.startswith("'first'"))
    assert "fails on the probe: ValueError: the table has 16 rows." in note
    assert "\n" not in note


def test_errors_of_the_function_given_as_logits_are_one_line():
    def logits(_):
        raise ValueError(TEXT)

    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(ArgumentError, match=r"ValueError: the table has 16 rows$"):
        Apoptosis(net, optimizer, torch.randn(2, 6), logits=logits)
