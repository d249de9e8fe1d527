"""What a window takes from the user's backward passes, and what the planner makes of it."""

import pytest
import torch
from torch import nn

from apoptosis import Apoptosis
from apoptosis.criteria import get_criterion
from apoptosis.graph import analyse
from apoptosis.observe import Observer
from apoptosis.planner import Request, make_plan
from apoptosis.planner.views import OUTPUTS_SHARE, blended


def window(net, example, **arguments):
    structure = analyse(net, (example,))
    groups = [g for g in structure.groups if g.pin is None]
    observer = Observer(net, groups, seed=0, gradients=True, **arguments)
    observer.open()
    return structure, observer


def felt_at(observer, group):
    """Rows of gradients."""
    return next(o.grad_factor for (name, _), o in observer.observations().items() if name == group)


def test_second_moments_are_those_of_autograd():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3))
    _, observer = window(net, torch.randn(4, 6))
    expected = torch.zeros(8, 8, dtype=torch.float64)
    for _ in range(3):
        x = torch.randn(16, 6)
        z = net[:2](x).detach().requires_grad_()
        g = torch.autograd.grad(net[2:](z).square().mean(), z)[0].double()
        expected += g.T @ g
        net(x).square().mean().backward()
        observer.end_step()
    rows = felt_at(observer, "0").double()  # fewer than a sketch holds; the passes of autograd.grad were seen, too
    assert len(rows) == 96
    torch.testing.assert_close(rows.T @ rows, 2 * expected, rtol=1e-5, atol=1e-12)
    observer.close()


def test_maps_are_seen_at_every_position_and_flattened_ones_alike():
    torch.manual_seed(0)
    body = (nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.ReLU())
    net = nn.Sequential(*body, nn.Flatten(), nn.Linear(48, 2))
    _, observer = window(net, torch.randn(2, 2, 6, 6))
    net(torch.randn(32, 2, 6, 6)).square().sum().backward()
    observer.end_step()
    assert felt_at(observer, "0").shape[1] == 4
    assert felt_at(observer, "2").shape[1] == 3
    assert bool(felt_at(observer, "2").ne(0).any(0).all())


def test_every_group_of_a_site_that_several_share_has_its_gradients():
    torch.manual_seed(0)

    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList(nn.Linear(5, size) for size in (16, 256))
            self.out = nn.Linear(272, 3)

        def forward(self, x):
            return self.out(torch.cat([part(x).relu() for part in self.parts], 1))

    net = Joined()
    _, observer = window(net, torch.randn(2, 5))
    for _ in range(8):
        net(torch.randn(128, 5)).square().mean().backward()
        observer.end_step()
    observer.close()
    grad_factor = {name: o.grad_factor for (name, _), o in observer.observations().items()}
    assert sorted(x.shape[1] for x in grad_factor.values()) == [16, 256]


def test_nothing_stays_on_tensors_of_the_users():
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))

    class Leaf(nn.Module):
        def __init__(self):
            super().__init__()
            self.state = nn.Parameter(torch.randn(3, 6))
            self.out = nn.Linear(6, 6)
            self.net = net

        def forward(self, x):
            return self.net(x).sum() + self.out(self.state).sum()

    model = Leaf()
    _, observer = window(model, torch.randn(3, 4))
    model(torch.randn(8, 4)).backward()
    observer.end_step()
    observer.close()
    assert not model.state._backward_hooks
    kept = model(torch.randn(8, 4))
    observer.open()
    late = model(torch.randn(8, 4))
    observer.close()
    seen = felt_at(observer, "net.0").clone()
    (kept + late).backward()
    torch.testing.assert_close(felt_at(observer, "net.0"), seen, rtol=0, atol=0)


def test_overflowing_gradients_are_passed_over():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    _, observer = window(net, torch.randn(3, 4))
    net(torch.randn(8, 4)).sum().mul(float("inf")).backward()
    observer.end_step()
    assert felt_at(observer, "0") is None
    observer.close()


def test_a_window_goes_on_where_its_state_stopped():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    batches = [torch.randn(8, 4) for _ in range(4)]
    found = []
    for interrupted in (False, True):
        _, observer = window(net, batches[0])
        for number, x in enumerate(batches):
            if interrupted and number == 2:
                state = observer.state_dict()
                observer.close()
                _, observer = window(net, batches[0])
                observer.load_state_dict(state)
            net(x).square().sum().backward()
            observer.end_step()
        observer.close()
        found.append(felt_at(observer, "0"))
    assert torch.equal(*found)


def test_channels_that_only_a_silent_output_reads_cost_little():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 4))
    with torch.no_grad():
        net[2].weight[0, :16] = 0.0  # the loss looks at output 0 alone; the first half of the channels feeds the others
        net[2].weight[1:, 16:] = 0.0
    structure, observer = window(net, torch.randn(3, 6))
    for _ in range(4):
        net(torch.randn(128, 6))[:, 0].square().mean().backward()
        observer.end_step()
    observer.close()
    kept = {}
    for name in ("interpolative", "reconstruction"):
        request = Request(tolerance=0.1, criterion=get_criterion(name), align=1, max_drop=0.95, seed=0)
        kept[name] = make_plan(net, structure, observer.observations(), request).reductions[0].keep
    assert len(kept["interpolative"]) <= len(kept["reconstruction"])
    assert (kept["interpolative"] >= 16).double().mean() > (kept["reconstruction"] >= 16).double().mean()


def test_blending_is_of_equal_sizes_and_nothing_without_gradients():
    weight = torch.randn(3, 5, 1)
    rows = weight[:, :, 0]
    plain = rows.T @ rows
    assert blended(None, weight) is None
    assert blended(torch.zeros(4, 5), weight) is None
    mixed = blended(7.0 * rows, weight)
    torch.testing.assert_close(mixed.T @ mixed, plain / plain.diagonal().mean())
    grad_factor = torch.randn(9, 5)
    mixed, own = blended(grad_factor, weight), grad_factor.T @ grad_factor
    expected = own / own.diagonal().mean() + OUTPUTS_SHARE * plain / plain.diagonal().mean()
    torch.testing.assert_close(mixed.T @ mixed, expected / (1.0 + OUTPUTS_SHARE))
    assert 0.0 <= OUTPUTS_SHARE < 1.0


@pytest.mark.parametrize("criterion", ["interpolative", "reconstruction"])
def test_a_run_takes_gradients_only_where_its_criterion_asks(criterion):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4))
    optimizer = torch.optim.Adam(net.parameters())
    apo = Apoptosis(net, optimizer, torch.randn(2, 8), criterion=criterion, total_steps=100)
    asked = set()
    for _ in range(40):
        net(torch.randn(64, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if apo._observer is not None:
            asked.add(any(o.grad_factor is not None for o in apo._observer.observations().values()))
        apo.step()
    assert (True in asked) == (criterion == "interpolative")
