"""Products whose operands are outputs of modules: hooks see them, and no pass is run again."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from apoptosis import Apoptosis
from apoptosis.graph import analyse, replay
from apoptosis.observe import MIN_EXAMPLES, Observer
from apoptosis.records import ProductSite


class Attention(nn.Module):
    """Queries and keys of layers of their own, or of one (packed); `change` is made to both before they meet."""

    def __init__(self, *, packed=False, shared=1, fused=True, change=None, heads=4, size=4, width=6):
        super().__init__()
        torch.manual_seed(0)
        self.heads, self.shared, self.packed, self.fused, self.change = heads, shared, packed, fused, change
        if packed:
            self.qkv = nn.Linear(width, 3 * heads * size)
        else:
            self.q, self.k = nn.Linear(width, heads * size), nn.Linear(width, heads // shared * size)
            self.v = nn.Linear(width, heads // shared * size)
        self.o = nn.Linear(heads * size, 3)

    def operands(self, x):
        batch, length, _ = x.shape
        if self.packed:
            return self.qkv(x).reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        q = self.q(x).view(batch, length, self.heads, -1).transpose(1, 2)
        k, v = (f(x).view(batch, length, self.heads // self.shared, -1).transpose(1, 2) for f in (self.k, self.v))
        if self.change is not None:
            q, k = self.change(self, q, x), self.change(self, k, x)
        if self.shared > 1:
            wide = (batch, self.heads // self.shared, self.shared, length, k.shape[-1])
            k, v = (t[:, :, None].expand(wide).reshape(batch, self.heads, length, -1) for t in (k, v))
        return q, k, v

    def forward(self, x):
        q, k, v = self.operands(x)
        if self.fused:
            out = F.scaled_dot_product_attention(q, k, v, scale=0.5)
        else:
            out = (q @ k.transpose(-1, -2) * 0.5).softmax(-1) @ v
        return self.o(out.transpose(1, 2).flatten(2))


def doubled_in_place(m, t, x):
    return t.mul_(2.0)


def doubled(m, t, x):
    return t * 2.0


def first_positions(m, t, x):
    return t[:, :, :3]


def called_twice(m, t, x):
    m.q(x + 1.0), m.k(x + 1.0)
    return t


def products(net, example):
    found = analyse(net, (example,)).groups
    return [(group, site) for group in found for site in group.sites if isinstance(site, ProductSite)]


def observed(net, x, groups, **options):
    observer = Observer(net, groups, seed=0, replay=replay, exact=True, any_mode=True, **options)
    observer.open()
    with torch.no_grad():
        net(x)
    observer.end_step()
    observer.close()
    return observer


@pytest.mark.parametrize(
    "options",
    [{}, {"fused": False}, {"packed": True}, {"packed": True, "fused": False}, {"shared": 2}, {"shared": 4}],
    ids=str,
)
def test_hooks_see_what_a_second_run_shows(runs, options):
    net, x = Attention(**options), runs.inputs(40, 1, (5, 6))
    (group, site), *_ = products(net, x[:2])
    assert len(site.outputs) == 2
    by_hooks = observed(net, x, [group]).observations()
    assert not observed(net, x, [group])._replayed.watches()
    again = replace(group, sites=tuple(replace(s, outputs=()) if s is site else s for s in group.sites))
    second = observed(net, x, [again]).observations()
    one, other = by_hooks[group.name, site.key], second[group.name, site.key]
    assert one.moments.num_rows == other.moments.num_rows == 200
    assert one.moments.num_examples == 200
    for mine, theirs in ((one.moments, other.moments), (one.right, other.right)):
        assert torch.allclose(mine.second_moment(), theirs.second_moment(), atol=1e-9)


@pytest.mark.parametrize("change", [doubled_in_place, doubled, first_positions, called_twice])
def test_what_no_module_returns_is_left_to_a_second_run(runs, change):
    net, x = Attention(change=change), runs.inputs(40, 1, (5, 6))
    (group, site), *_ = products(net, x[:2])
    assert site.outputs == ()
    seen = observed(net, x, [group]).observations()[group.name, site.key]
    q, k, _ = (t.detach().double().transpose(1, 2).flatten(2).flatten(0, 1) for t in net.operands(x))
    places = torch.from_numpy(site.input_columns.reshape(-1))
    for moments, rows in ((seen.moments, q), (seen.right, k)):
        rows = rows[:, places]
        assert torch.allclose(moments.second_moment(), rows.T @ rows / len(rows), atol=1e-9)


def test_a_window_in_training_ends_without_a_pass_of_its_own(runs):
    net = Attention()
    groups = [group for group, _ in products(net, runs.inputs(2, 0, (5, 6)))]
    passes = []
    net.register_forward_hook(lambda *args: passes.append(1))
    observer = Observer(net, groups, seed=0, replay=replay)
    observer.open()
    steps, over = 0, False
    while not over:
        net(runs.inputs(64, steps, (5, 6))).sum().backward()
        over, steps = observer.end_step(), steps + 1
    observer.close()
    assert steps == len(passes) == MIN_EXAMPLES // 64
    assert not any(module._forward_hooks for name, module in net.named_modules() if name)


def test_a_window_of_a_file_from_before_goes_on_with_the_rows_of_its_second_runs(runs):
    def passes(observer, first, last):
        for step in range(first, last):
            net(runs.inputs(16, step, (20, 6))).sum().backward()
            observer.end_step()

    net = Attention()
    (group, site), *_ = products(net, runs.inputs(2, 0, (20, 6)))
    old = replace(group, sites=tuple(replace(s, outputs=()) if s is site else s for s in group.sites))
    before = Observer(net, [old], seed=0, replay=replay)
    before.open()
    passes(before, 0, 3)
    before.close()
    rows = before.observations()[group.name, site.key].moments.num_rows
    now = Observer(net, [group], seed=0, replay=replay)
    now.load_state_dict(copy.deepcopy(before.state_dict()))
    assert now.observations()[group.name, site.key].moments.num_rows == rows > 0
    now.open()
    passes(now, 3, 6)
    now.close()
    assert now.observations()[group.name, site.key].moments.num_rows > rows


def test_a_run_that_is_resumed_within_a_window_does_the_same(runs):
    def run(stop):
        net = nn.Sequential(nn.Linear(6, 6), Attention())
        optimizer = torch.optim.SGD(net.parameters(), 1e-2)
        options = {"total_steps": 300, "tolerance": 0.3, "align": 1, "calibration": 0.0}
        apo = Apoptosis(net, optimizer, runs.inputs(2, 0, (5, 6)), **options)
        for step in range(120):
            if step == stop:
                assert apo.watching
                state = copy.deepcopy(apo.state_dict())
                apo.close()
                apo = Apoptosis(net, optimizer, runs.inputs(2, 0, (5, 6)), **options)
                apo.load_state_dict(state)
            loss = net(runs.inputs(32, step, (5, 6))).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            apo.step()
        return net, apo

    (one, whole), (other, resumed) = run(None), run(31)
    assert whole.ledger().events == resumed.ledger().events > 0
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))
