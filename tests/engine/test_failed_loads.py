"""A load that fails, wherever it does: the run goes on as if it had not been tried."""

from __future__ import annotations

import copy
import signal
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import apoptosis
from apoptosis import Apoptosis
from apoptosis.decide.policy import first_look

TOTAL = 480  # steps of a run that is long enough for looks
HERE = Path(apoptosis.__file__).parent
FILES = {
    str(HERE / name) for name in ("engine/__init__.py", "engine/resuming.py", "engine/looks.py", "observe/spread.py")
}


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 6))


def start(net, **options):
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    return optimizer, Apoptosis(net, optimizer, torch.zeros(2, 6), align=1, calibration=1.0, **options)


def train(net, optimizer, apo, steps):
    for step in steps:
        x = torch.randn(32, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        nn.functional.mse_loss(net(x), x).backward()
        optimizer.step()
        apo.step()


def hooks(net):
    return [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in net.modules()]


def told(apo):
    """What decides how a run goes on."""
    state = apo.state_dict()
    for name in ("own_seconds", "hook_seconds"):
        del state["memory"][name]
    return repr(state)


class Interrupt:
    """Sends SIGINT at the n-th line that runs in the library's files."""

    def __init__(self, at):
        self.at, self.count = at, 0

    def __call__(self, frame, event, arg):
        if frame.f_code.co_filename not in FILES:
            return None
        if event == "line":
            self.count += 1
            if self.count - 1 == self.at:
                signal.raise_signal(signal.SIGINT)
        return self

    def run(self, work):
        before = sys.gettrace()
        sys.settrace(self)
        try:
            work()
        finally:
            sys.settrace(before)


@pytest.mark.parametrize("where", ["a look", "a window"])
def test_an_interrupt_anywhere_in_a_load_leaves_the_open_look_and_window(where):
    """The run goes on bitwise as its twin, which loaded nothing."""
    stop = 121 if where == "a window" else first_look(TOTAL)
    runs, states = [], []
    for steps in (range(60), *[range(stop)] * 3):
        net = network()
        runs.append((net, *start(net, total_steps=TOTAL)))
        train(*runs[-1], steps)
        states.append(copy.deepcopy(runs[-1][2].state_dict()))
    _, (_, _, other), twin, (net, _, apo) = runs
    lines = Interrupt(-1)
    lines.run(lambda: other.load_state_dict(states[0]))
    put, before, seconds = hooks(net), told(apo), apo.hook_seconds
    assert sum(put) > 0
    assert (where == "a window") == apo.watching
    for at in (*range(0, lines.count - 40, 13), *range(lines.count - 40, lines.count)):
        with pytest.raises(KeyboardInterrupt):
            Interrupt(at).run(lambda: apo.load_state_dict(states[0]))
        assert hooks(net) == put, at
        assert told(apo) == before, at
    assert apo.hook_seconds == seconds
    for run in runs[2:]:
        train(*run, range(stop, 135))
    assert told(apo) == told(twin[2])
    assert apo.ledger().history
    assert all(torch.equal(a, b) for a, b in zip(twin[0].parameters(), net.parameters(), strict=True))
