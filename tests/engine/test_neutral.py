"""What apoptosis leaves bitwise as it is: training when it is not due, when it looks, and when it is made."""

import random

import numpy as np
import torch
from torch import nn

from apoptosis import Apoptosis


def test_never_due_is_bitwise_the_training_without(runs):
    def run(watched):
        net = nn.Sequential(*runs.cnn(), nn.Dropout(0.3))
        torch.manual_seed(5)
        random.seed(5)
        np.random.seed(5)
        optimizer = runs.adam(net)
        if watched:
            Apoptosis(net, optimizer, runs.inputs(4, 1, (2, 6, 6)), total_steps=10_000)
        runs.train(net, optimizer, None, steps=1, shape=(2, 6, 6))
        apo = Apoptosis(net, optimizer, runs.inputs(4, 1, (2, 6, 6)), total_steps=10_000) if watched else None
        if apo is not None:
            assert apo.decision.at_step > 20
        runs.train(net, optimizer, apo, steps=5, shape=(2, 6, 6))
        return runs.everything(net, optimizer)

    assert runs.same(run(True), run(False))


def test_an_open_window_changes_nothing_of_the_training(runs):
    def run(watched):
        net = nn.Sequential(*runs.cnn(), nn.Dropout(0.3))
        torch.manual_seed(5)
        optimizer = runs.adam(net)
        apo = runs.start(net, optimizer, runs.inputs(4, 1, (2, 6, 6))) if watched else None
        runs.train(net, optimizer, apo, steps=7, shape=(2, 6, 6))
        if apo is not None:
            assert runs.num_hooks(net) > 0
            apo.plan()
            apo.close()
        return runs.everything(net, optimizer)

    assert runs.same(run(True), run(False))


def test_construction_leaves_no_trace_even_of_modules_that_count(runs):
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            random.random()
            np.random.rand()
            return x

    net = nn.Sequential(*runs.mlp(), Counter(), nn.Dropout(0.5))
    net.train()
    net[1].eval()
    optimizer = runs.adam(net)
    before = runs.everything(net, optimizer)
    Apoptosis(net, optimizer, runs.inputs(4, 1), probe=runs.inputs(8, 2))
    assert runs.same(runs.everything(net, optimizer), before)


def test_hooks_exist_only_during_windows_and_the_users_own_stay(runs):
    net = runs.mlp()
    optimizer = runs.adam(net)
    calls = []
    net[2].register_forward_pre_hook(lambda module, args: calls.append(1))
    apo = runs.start(net, optimizer)
    counts = []
    runs.train(net, optimizer, apo, after=lambda step: counts.append(runs.num_hooks(net)))
    assert set(counts) == {1, max(counts)}
    assert max(counts) > 1
    assert counts[-1] == 1
    assert len(calls) >= runs.STEPS


def test_looking_at_the_plan_does_not_change_what_happens(runs):
    def run(looking):
        net = runs.mlp()
        optimizer = runs.adam(net)
        apo = runs.start(net, optimizer)
        events = runs.train(net, optimizer, apo, after=(lambda step: apo.plan()) if looking else None)
        assert events
        return runs.everything(net, optimizer)

    assert runs.same(run(True), run(False))
