"""What a window takes from the user's forward passes, and what it leaves alone."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from apoptosis.errors import NonFiniteError
from apoptosis.graph import analyse
from apoptosis.observe import MIN_EXAMPLES, Observer
from apoptosis.observe.accumulators import MIN_ROWS


def window(net, example, **arguments):
    structure = analyse(net, (example,))
    groups = [g for g in structure.groups if g.pin is None]
    observer = Observer(net, groups, seed=0, **arguments)
    observer.open()
    return observer


def rows_at(observer, group="0"):
    return sum(o.moments.num_rows for (name, _), o in observer.observations().items() if name == group)


class Checkpointed(nn.Module):
    def __init__(self, kind, twice=False):
        super().__init__()
        self.first, self.body, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.kind, self.twice = kind, twice

    def block(self, x):
        x = torch.relu(self.body(x))
        return torch.relu(self.body(x)) if self.twice else x

    def forward(self, x):
        x = torch.relu(self.first(x))
        if self.kind is None:
            return self.last(self.block(x))
        return self.last(checkpoint(self.block, x, use_reentrant=self.kind))


def test_evaluation_and_passes_without_gradients_never_count(runs):
    net = runs.mlp(8)
    observer = window(net, runs.inputs(4, 0))
    x = runs.inputs(32, 1)
    net.eval()
    net(x).sum().backward()
    net.train()
    with torch.no_grad():
        net(x)
    with torch.inference_mode():
        net(x)
    assert observer.observations() == {}
    assert observer.saw_nothing
    net(x).sum().backward()
    assert rows_at(observer) == 32
    observer.close()
    net(x)
    assert rows_at(observer) == 32


@pytest.mark.parametrize("twice", [False, True])
def test_checkpointed_segments_count_once(runs, twice):
    seen = []
    for kind in (None, False, True):
        torch.manual_seed(0)
        net = Checkpointed(kind, twice)
        observer = window(net, runs.inputs(4, 0))
        for step in range(3):
            x = runs.inputs(16, step).requires_grad_()
            net(x).sum().backward()
            observer.end_step()
        found = observer.observations()
        seen.append({key: (o.moments.num_rows, o.moments.mean) for key, o in found.items()})
        assert observer.examples == 48
        observer.close()
    assert seen[0].keys() == seen[1].keys() == seen[2].keys()
    for key, (rows, mean) in seen[0].items():
        for other in seen[1:]:
            assert other[key][0] == rows
            assert torch.allclose(other[key][1], mean, atol=1e-6)


def test_moments_are_those_of_the_rows(runs):
    net = runs.mlp(8)
    taken = []
    net[2].register_forward_pre_hook(lambda module, args: taken.append(args[0].detach()))
    observer = window(net, runs.inputs(4, 0), exact=True)
    taken.clear()
    for step in range(4):
        net(runs.inputs(16, step)).sum().backward()
    rows = torch.cat(taken).double()
    found = next(o for (name, _), o in observer.observations().items() if name == "0").moments
    assert torch.allclose(found.mean, rows.mean(0), atol=1e-12)
    assert torch.allclose(found.covariance(), rows.T.cov(correction=0), atol=1e-12)


def test_dropout_is_looked_behind(runs):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(8, 2))
    taken = []
    net[2].register_forward_pre_hook(lambda module, args: taken.append(args[0].detach()))
    observer = window(net, runs.inputs(4, 0))
    taken.clear()
    for step in range(4):
        net(runs.inputs(16, step)).sum().backward()
    (found,) = observer.observations().values()
    assert found.dropout == 0.0
    rows = torch.cat(taken).double()
    assert torch.allclose(found.moments.covariance(), rows.T.cov(correction=0), atol=1e-6)


def test_dropout_without_a_module_is_told(runs):
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.b(nn.functional.dropout(torch.relu(self.a(x)), 0.25, self.training))

    net = Functional()
    observer = window(net, runs.inputs(4, 0))
    net(runs.inputs(64, 1)).sum().backward()
    (found,) = observer.observations().values()
    assert found.dropout == pytest.approx(0.25)


def test_dropout_in_place_and_switched_off(runs):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Identity(), nn.Dropout(0.5, inplace=True), nn.Linear(8, 2))
    observer = window(net, runs.inputs(4, 0))
    net(runs.inputs(64, 1)).sum().backward()
    (found,) = observer.observations().values()
    assert found.dropout == pytest.approx(0.5)
    observer.close()
    observer = window(net, runs.inputs(4, 0))
    net[2].eval()
    net(runs.inputs(64, 1)).sum().backward()
    (found,) = observer.observations().values()
    assert found.dropout == 0.0


def test_positions_of_an_example_are_no_examples(runs):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    observer = window(net, runs.inputs(4, 0, (20, 6)))
    over = False
    for step in range(MIN_EXAMPLES // 16):
        assert not over
        net(runs.inputs(16, step, (20, 6))).sum().backward()
        assert observer.examples == 16 * (step + 1)
        over = observer.end_step()
    assert over
    assert 24 <= rows_at(observer) < 20 * 16


def test_positions_flattened_before_the_module_are_no_examples_either(runs):
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.b(torch.relu(self.a(x.reshape(-1, 6)))).reshape(*x.shape[:2], 2)

    net = Flat()
    observer = window(net, runs.inputs(4, 0, (20, 6)))
    net(runs.inputs(16, 1, (20, 6))).sum().backward()
    net(runs.inputs(16, 2, (20, 6))).sum().backward()
    assert observer.examples == 32


def test_a_module_called_twice_in_a_pass_sees_its_examples_once(runs):
    net = Checkpointed(None, twice=True)
    observer = window(net, runs.inputs(4, 0))
    net(runs.inputs(16, 1)).sum().backward()
    assert observer.examples == 16
    assert rows_at(observer, "first") == 32 + 16  # both calls of body, and the one of last: one group


def test_rows_of_flattened_maps_come_from_many_examples(runs):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 3))
    observer = window(net, runs.inputs(4, 0, (2, 6, 6)))
    watch = next(iter(observer._watches.values()))
    x = torch.zeros(64, 2, 6, 6)
    x[:] = torch.arange(64.0)[:, None, None, None]
    net(x).sum().backward()
    rows = torch.cat(watch.buffer)
    assert rows.shape[1] == 4
    assert len(torch.unique(rows, dim=0)) > 4  # an even share of a batch: 8 rows, not all of one or two images


def test_convolution_rows_are_positions(runs):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Conv1d(4, 3, 1))
    taken = []
    net[2].register_forward_pre_hook(lambda module, args: taken.append(args[0].detach()))
    observer = window(net, runs.inputs(4, 0, (2, 9)), exact=True)
    taken.clear()
    net(runs.inputs(4, 1, (2, 9))).sum().backward()
    net(runs.inputs(2, 1, (2, 9))[0]).sum().backward()  # unbatched
    (watch,) = observer._watches.values()
    possible = torch.cat([t.reshape(-1, 4, 7) for t in taken]).movedim(1, -1).reshape(-1, 4).double()
    for row in torch.cat(watch.buffer):
        assert (possible == row).all(1).any()
    assert observer.examples == 5


def test_concatenated_groups_are_seen_together(runs):
    class Cat(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(22, 3)

        def forward(self, x):
            return self.c(torch.cat([torch.relu(self.a(x)), x, torch.tanh(self.b(x))], 1))

    net = Cat()
    taken = []
    net.c.register_forward_pre_hook(lambda module, args: taken.append(args[0].detach()))
    observer = window(net, runs.inputs(4, 0), exact=True)
    taken.clear()
    net(runs.inputs(64, 1)).sum().backward()
    found = observer.observations()
    covariance = taken[0].double().T.cov(correction=0)
    assert torch.allclose(found["a", "c:c.weight:1"].whole.covariance(), covariance, atol=1e-12)
    assert torch.allclose(found["a", "c:c.weight:1"].moments.covariance(), covariance[:8, :8], atol=1e-12)
    assert torch.allclose(found["b", "c:c.weight:1"].moments.covariance(), covariance[14:, 14:], atol=1e-12)


def test_copies_and_pickles_made_in_a_window_carry_no_live_hooks(runs):
    net = runs.mlp(8)
    observer = window(net, runs.inputs(4, 0))
    twin, loaded = copy.deepcopy(net), pickle.loads(pickle.dumps(net))
    for other in (twin, loaded):
        other.train()
        other(runs.inputs(16, 1)).sum().backward()
    assert observer.saw_nothing
    net(runs.inputs(16, 1)).sum().backward()
    assert rows_at(observer) == 16


def test_functional_transforms_pass_unseen(runs):
    net = runs.mlp(8)
    observer = window(net, runs.inputs(4, 0))
    parameters = dict(net.named_parameters())

    def loss(weights, x):
        return torch.func.functional_call(net, weights, (x,)).sum()

    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, runs.inputs(5, 1))
    assert grads["0.weight"].shape == (5, 8, 6)
    assert observer.observations() == {}


def test_not_finite_rows_never_raise_inside_the_users_forward(runs):
    net = runs.mlp(8)
    observer = window(net, runs.inputs(4, 0))
    x = runs.inputs(5000, 1)
    x[7] = float("inf")
    net(x).sum()
    observer.end_step()
    with pytest.raises(NonFiniteError):
        observer.observations()


def test_half_precision_rows_are_widened(runs):
    net = runs.mlp(8).bfloat16()
    observer = window(net, runs.inputs(4, 0).bfloat16())
    net(runs.inputs(64, 1).bfloat16()).sum().backward()
    assert all(o.moments.covariance().dtype == torch.float64 for o in observer.observations().values())


def test_a_half_filled_window_goes_on_exactly(runs):
    def passes(net, observer, first, last):
        for step in range(first, last):
            net(runs.inputs(16, step, (2, 6, 6))).sum().backward()
            observer.end_step()

    net = runs.cnn()
    example = runs.inputs(4, 0, (2, 6, 6))
    whole = window(net, example, keep_inputs=True)
    passes(net, whole, 0, 6)
    whole.close()
    first = window(net, example, keep_inputs=True)
    passes(net, first, 0, 3)
    first.close()
    second = window(net, example, keep_inputs=True)
    second.load_state_dict(first.state_dict())
    passes(net, second, 3, 6)
    second.close()
    a, b = whole.state_dict(), second.state_dict()
    for state in (a, b):  # BatchNorm's statistics do not enter training passes, so the rows are the same
        state["inputs"] = runs.same(state["inputs"][0][0], runs.inputs(16, 5, (2, 6, 6)))
    assert a["inputs"]
    assert b["inputs"]
    assert runs.same(a, b)


def test_the_largest_batch_is_kept_for_measuring(runs):
    net = runs.mlp(8)
    observer = window(net, runs.inputs(4, 0), keep_inputs=True)
    for rows in (8, 32, 1):
        net(runs.inputs(rows, rows)).sum().backward()
    assert torch.equal(observer.inputs[0][0], runs.inputs(32, 32))


def test_a_width_that_changes_under_a_window_is_told_and_not_raised(runs):
    net = runs.mlp(8)
    observer = window(net, runs.inputs(4, 0))
    net[0], net[2] = nn.Linear(6, 5), nn.Linear(5, 8)
    observer.close()
    observer._modules["2"] = net[2]
    observer.open()
    net(runs.inputs(16, 1)).sum().backward()
    with pytest.raises(NonFiniteError, match="width"):
        observer.observations()


def test_a_few_channels_are_not_judged_by_a_few_rows(runs):
    net = nn.Sequential(nn.Linear(6, 3), nn.ReLU(), nn.Linear(3, 2))
    observer = window(net, runs.inputs(4, 0), any_mode=True)
    net(runs.inputs(500, 1, (7, 6)))
    assert rows_at(observer) == MIN_ROWS
