"""Pins that follow from a frozen parameter go when it is unfrozen, in a run and in one that is resumed."""

import pytest
import torch
from torch import nn

from apoptosis import Apoptosis


class Recurrent(nn.Module):
    """Both layers have one hidden width: a frozen weight of the first pins the second, too."""

    def __init__(self):
        super().__init__()
        self.layers = nn.LSTM(6, 16, num_layers=2, batch_first=True)
        self.hidden = nn.Linear(16, 24)
        self.head = nn.Linear(24, 3)
        with torch.no_grad():  # half of the hidden channels are always zero
            for parameter in self.layers.parameters():
                parameter.view(4, 16, -1)[:, 8:] = 0.0
        for name in ("weight_ih_l0", "weight_hh_l0"):
            getattr(self.layers, name).requires_grad_(False)

    def forward(self, x):
        return self.head(torch.relu(self.hidden(self.layers(x)[0])))


def start(net, optimizer):
    return Apoptosis(net, optimizer, torch.randn(2, 5, 6), total_steps=100, tolerance=0.1, calibration=1.0, align=1)


def steps(net, optimizer, apo, count):
    events = []
    for _ in range(count):
        optimizer.zero_grad()
        net(torch.randn(64, 5, 6)).sigmoid().mean().backward()
        optimizer.step()
        if event := apo.step():
            events.append(event)
    return events


@pytest.fixture
def run():
    torch.manual_seed(0)
    net = Recurrent()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-5)
    return net, optimizer, start(net, optimizer)


def test_a_pin_that_follows_names_the_code_of_its_cause(run):
    pins = {pin.group: pin for pin in run[2].pins()}
    assert (pins["layers"].code, pins["layers"].cause) == ("frozen", "")
    assert (pins["layers#2"].code, pins["layers#2"].cause) == ("shared_width", "frozen")


def test_the_other_layers_of_a_recurrence_shrink_once_one_is_unfrozen(run):
    net, optimizer, apo = run
    steps(net, optimizer, apo, 3)
    net.requires_grad_(True)
    assert steps(net, optimizer, apo, 97)
    assert net.layers.hidden_size < 16
    assert {pin.group for pin in apo.pins()} == {"head"}


@pytest.mark.parametrize("with_codes", [True, False])
def test_a_run_that_is_resumed_with_all_parameters_trained_has_none_of_these_pins(run, with_codes):
    net, optimizer, apo = run
    steps(net, optimizer, apo, 3)
    state = apo.state_dict()
    if not with_codes:  # as versions wrote it that knew texts alone
        for pin in state["pins"]:
            del pin["code"], pin["operator"], pin["cause"]
    net.requires_grad_(True)
    resumed = start(net, optimizer)
    resumed.load_state_dict(state)
    assert {pin.group for pin in resumed.pins()} == {"head"}
    resumed.close()
    apo.close()
