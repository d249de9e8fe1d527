"""Plans: certificates against direct measurements, tolerances of shared sites, widths, costs, variances."""

import copy

import pytest
import torch
from torch import nn

from apoptosis import shrink_
from apoptosis.criteria import criteria, get_criterion
from apoptosis.graph import analyse
from apoptosis.numerics.linalg import roundoff_floor
from apoptosis.observe import Observer
from apoptosis.planner import Request, make_plan, merged
from apoptosis.records import Certificate


class Cat(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(6, 48), nn.Linear(6, 48), nn.Linear(102, 5)

    def forward(self, x):
        return self.c(torch.cat([torch.relu(self.a(x)), torch.tanh(self.b(x)), x], 1))


def output_of(net, module, x):
    """What a module gives before its bias, and its input."""
    seen = []
    handle = module.register_forward_hook(lambda m, args, out: seen.append((args[0].detach(), out.detach())))
    net.eval()
    with torch.no_grad():
        net(x)
    handle.remove()
    return seen[0]


def observe(net, x, exact=True):
    structure = analyse(net, (x[:4],))
    observer = Observer(net, [g for g in structure.groups if g.pin is None], seed=0, exact=exact, any_mode=True)
    observer.open()
    with torch.no_grad():
        net.eval()(x)
    observer.close()
    return structure, observer.observations()


def request(**given):
    found = {"criterion": get_criterion("interpolative"), "tolerance": 0.05, "align": 1, "max_drop": 1.0, "seed": 0}
    return Request(**(found | given))


def relative(before, after):
    over = tuple(d for d in range(before.dim()) if d != 1)
    return float(((after - before).square().sum() / (before - before.mean(over, keepdim=True)).square().sum()).sqrt())


@pytest.mark.parametrize("criterion", criteria())
def test_certificate_is_the_measured_change_of_the_consumer(runs, criterion):
    net = runs.mlp(48).double()
    x = runs.inputs(600, 3).double()
    _, before = output_of(net, net[2], x)
    event = shrink_(net, x[:4], [x], tolerance=0.2, criterion=criterion, exclude=("2",), probe=x)
    if not event:
        assert criterion in ("constant", "duplicate")  # nothing of the kind is there
        return
    _, after = output_of(net, net[2], x)
    (certificate,) = [c for c in event.certificates if c.kind == "empirical"]
    assert certificate.rows == 600
    assert certificate.value == pytest.approx(relative(before, after), rel=1e-4)
    assert certificate.value <= 0.2


@pytest.mark.parametrize("padding", [0, 1])
def test_certificate_of_a_kernel_is_the_measured_change_on_the_sample(runs, padding):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 24, 3), nn.ReLU(), nn.Conv2d(24, 5, 3, padding=padding)).double()
    x = runs.inputs(48, 3, (2, 7, 7)).double()
    given, before = output_of(net, net[2], x)
    centred = given - given.mean((0, 2, 3), keepdim=True)
    with torch.no_grad():
        scale = net[2](centred) - net[2].bias[:, None, None]
    event = shrink_(net, x[:4], [x], tolerance=0.3, probe=x)
    assert event
    _, after = output_of(net, net[2], x)
    (certificate,) = [c for c in event.certificates if c.kind == "empirical"]
    measured = float(((after - before).square().sum() / scale.square().sum()).sqrt())
    assert certificate.value == pytest.approx(measured, rel=1e-4)
    assert 0.0 < certificate.value <= 0.3


def test_groups_that_share_a_site_share_its_tolerance(runs):
    net = Cat().double()
    x = runs.inputs(1000, 3).double()
    _, before = output_of(net, net.c, x)
    event = shrink_(net, x[:4], [x], tolerance=0.1, probe=x)
    assert set(event.groups) == {"a", "b"}
    _, after = output_of(net, net.c, x)
    (certificate,) = [c for c in event.certificates if c.kind == "empirical"]
    assert relative(before, after) <= certificate.value <= 0.1
    plain = Cat().double()
    one = shrink_(plain, x[:4], [x], tolerance=0.1, exclude=("b",), probe=x)
    _, after = output_of(plain, plain.c, x)
    (certificate,) = [c for c in one.certificates if c.kind == "empirical"]
    # Relative to the whole output, what a and x contribute included.
    assert certificate.value == pytest.approx(relative(before, after), rel=1e-4)


def test_what_one_group_leaves_over_the_next_may_use(runs):
    net = Cat().double()
    x = runs.inputs(1000, 3).double()
    structure, observations = observe(net, x)
    plan = make_plan(net, structure, observations, request(tolerance=0.1))
    key = "c:c.weight:1"
    assert plan.errors["a"][key] <= 0.05
    assert plan.errors["b"][key] > 0.05
    assert plan.site_errors[key] == pytest.approx(plan.errors["a"][key] + plan.errors["b"][key])
    assert plan.site_errors[key] <= 0.1


def test_allowance_caps_and_ends(runs):
    net = runs.mlp(48)
    structure, observations = observe(net, runs.inputs(1000, 3))
    sites = {g.name: g.sites[0].key for g in structure.groups if g.sites}
    plan = make_plan(net, structure, observations, request(tolerance=0.1, remaining_error={sites["0"]: 0.02}))
    assert plan.errors["0"][sites["0"]] <= 0.02 < plan.errors["2"][sites["2"]]
    spent = make_plan(net, structure, observations, request(tolerance=0.1, remaining_error={sites["0"]: 0.0}))
    assert "0" not in spent.widths
    assert spent.left["0"].cause == "limit"
    assert "the error budget that is left for all further events at '2' (0) is below round-off" in spent.left["0"].text
    spent = make_plan(net, structure, observations, request(tolerance=0.0, remaining_error={sites["0"]: 0.0}))
    assert {why.cause for why in spent.left.values()} == {"limit", "tolerance"}


@pytest.mark.parametrize("align", [1, 8, 16])
def test_widths_are_multiples_and_a_tenth_stays(runs, align):
    net = runs.mlp(48)
    structure, observations = observe(net, runs.inputs(1000, 3))
    plan = make_plan(net, structure, observations, request(tolerance=0.9, align=align, max_drop=0.9))
    assert plan.widths
    for width, kept in plan.widths.values():
        assert kept % align == 0
        assert kept >= 0.1 * width - 1
        assert kept < width


def test_an_event_that_crosses_no_multiple_is_no_event(runs):
    net = runs.mlp(48)
    structure, observations = observe(net, runs.inputs(1000, 3))
    plan = make_plan(net, structure, observations, request(align=48))
    assert plan.reductions == ()
    assert plan.macs_after == plan.macs_before == structure.macs
    assert (
        "its 48 channels can only be removed 48 at a time, so no narrower width is possible: an align= below 48"
        in str(plan)
    )
    assert {why.cause for why in plan.left.values()} == {"align"}


def test_too_few_rows_are_not_believed(runs):
    net = runs.mlp(48)
    structure, observations = observe(net, runs.inputs(60, 3))
    plan = make_plan(net, structure, observations, request(tolerance=0.02))
    assert plan.reductions == ()
    assert {why.cause for why in plan.left.values()} == {"rows"}
    assert any("60 rows were observed at '" in note for note in plan.notes)


def test_unobserved_groups_are_said(runs):
    net = runs.mlp(48)
    structure, observations = observe(net, runs.inputs(600, 3))
    del observations[next(iter(observations))]
    plan = make_plan(net, structure, observations, request())
    assert "0" not in plan.widths
    assert "2" in plan.widths
    assert plan.left["0"].cause == "unseen"
    assert plan.notes[0] == "0: not observed yet: no pass of the window ran '2', which reads it"
    assert "2: 48 ->" in str(plan)


def networks(runs):
    torch.manual_seed(0)
    yield runs.mlp(48), (6,)
    yield nn.Sequential(*runs.cnn(), nn.ReLU(), nn.Linear(4, 3)), (2, 6, 6)
    yield runs.cnn(groups=4), (2, 6, 6)
    yield Cat(), (6,)


def test_predicted_cost_is_the_cost_after(runs):
    for net, shape in networks(runs):
        x = runs.inputs(300, 3, shape)
        example = x[:4]
        structure, observations = observe(net, x, exact=False)
        plan = make_plan(net, structure, observations, request(tolerance=0.4))
        assert plan.macs_before == structure.macs
        event = shrink_(net, example, [x], tolerance=0.4, probe=x)
        if {name: tuple(pair) for name, pair in plan.widths.items()} != event.groups:
            continue  # halved by the sanity limit
        assert event.macs == (plan.macs_before / 4, pytest.approx(plan.macs_after / 4))  # per example
        assert event.macs[1] == pytest.approx(analyse(net, (example,)).macs / 4)


def test_linear_dependence_goes_at_tolerance_zero_and_nothing_else(runs):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 12), nn.Linear(12, 4)).double()
    with torch.no_grad():
        net[0].weight[8:] = torch.randn(4, 8).double() @ net[0].weight[:8]
        net[0].bias[8:] = torch.randn(4).double()
    x = runs.inputs(300, 3, (20,)).double()
    before = net(x).detach()
    event = shrink_(net, x[:4], [x], tolerance=0.0, probe=x)
    assert event.groups == {"0": (12, 8)}
    assert torch.allclose(net(x), before, rtol=0, atol=1e-10)
    assert max(c.value for c in event.certificates if c.kind == "empirical") <= roundoff_floor(12)
    assert not shrink_(net, x[:4], [x], tolerance=0.0, probe=x)


@pytest.mark.parametrize("kind", ["linear", "kernel", "padded"])
@pytest.mark.parametrize("criterion", ["interpolative", "magnitude"])
def test_running_statistics_behind_the_consumer_describe_the_new_output(runs, kind, criterion):
    torch.manual_seed(0)
    if kind == "linear":
        shape, layers = (6,), [nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 8), nn.BatchNorm1d(8, momentum=None)]
    else:
        pad = int(kind == "padded")
        shape = (2, 6, 6)
        layers = [nn.Conv2d(2, 24, 3), nn.ReLU(), nn.Conv2d(24, 8, 3, padding=pad), nn.BatchNorm2d(8, momentum=None)]
    net = nn.Sequential(*layers, nn.Flatten()).double()
    x = runs.inputs(64 if kind != "linear" else 500, 3, shape).double()
    with torch.no_grad():
        net.train()(x)
    event = shrink_(net, x[:4], [x], tolerance=0.45, criterion=criterion)
    assert event
    _, after = output_of(net, net[2], x)
    over = tuple(d for d in range(after.dim()) if d != 1)
    n = after.numel() / after.shape[1]
    assert torch.allclose(net[3].running_var, after.var(over, correction=0) * n / (n - 1), rtol=2e-2)
    if criterion == "interpolative" and kind != "padded":
        exact = kind == "linear"  # of kernels' inputs only some positions entered the fit
        assert torch.allclose(net[3].running_mean, after.mean(over), atol=1e-6 if exact else 0.01)


def test_plan_changes_nothing_and_knows_weights_that_are_not_finite(runs):
    net = runs.mlp(32)
    structure, observations = observe(net, runs.inputs(300, 3))
    before = copy.deepcopy(net.state_dict())
    make_plan(net, structure, observations, request())
    assert runs.same(dict(net.state_dict()), dict(before))


def test_merged_certificates_add_up():
    parts = [
        Certificate(kind="empirical", subject="a", value=0.1, rows=5),
        Certificate(kind="empirical", subject="b", value=0.2, rows=7),
        Certificate(kind="empirical", subject="a", value=0.3, rows=4),
        Certificate(kind="worst_case", subject="a", value=9.0),
    ]
    found = merged(parts)
    assert [(c.kind, c.subject, c.value, c.rows) for c in found] == [
        ("empirical", "a", pytest.approx(0.4), 4),
        ("empirical", "b", 0.2, 7),
        ("worst_case", "a", 9.0, 0),
    ]


@pytest.mark.parametrize("functional", [False, True])
def test_what_fires_at_one_position_of_a_thousand_is_not_silent(runs, functional):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x):
            h = torch.relu(self.a(x))
            return nn.functional.linear(h, self.b.weight, self.b.bias) if functional else self.b(h)

    net = Net().double().eval()
    x = runs.inputs(40, 3, (100, 6)).double()
    with torch.no_grad():
        highest = (x @ net.a.weight[5]).flatten().sort().values
        net.a.bias[5] = -(highest[-4] + highest[-5]) / 2  # on at 4 of 4000 positions
        net.a.weight[6], net.a.bias[6] = net.a.weight[2], net.a.bias[2]
    before = net(x).detach()
    event = shrink_(net, x[:4], [x], tolerance=0.0)
    assert event.groups == {"a": (8, 7)}
    assert torch.allclose(net(x), before, rtol=0, atol=1e-9)
