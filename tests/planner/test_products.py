"""Plans for products of activations, rows, alternatives and slices: certificates against direct measurements."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from apoptosis import shrink_
from apoptosis.criteria import criteria, get_criterion
from apoptosis.graph import analyse, replay
from apoptosis.observe import Observer
from apoptosis.planner import Request, macs_after, make_plan
from apoptosis.planner.couplings import common_steps, tasks_of, units_of
from apoptosis.planner.views import make_view
from apoptosis.records import Group, Member, ProductSite, Seen, Structure

HEADS, SIZE, WIDTH, LENGTH = 4, 6, 10, 5
criteria_of_products = pytest.mark.parametrize(  # "pairwise" compares neurons, which a pair of channels is not
    "criterion", [name for name in criteria() if name != "pairwise"]
)


class Attention(nn.Module):
    """Attention by hand, its scores kept; with fewer heads of keys than of queries they are shared."""

    def __init__(self, shared=1, heads=HEADS, turned=False):
        super().__init__()
        torch.manual_seed(0)
        self.heads, self.shared, self.turned = heads, shared, turned
        keys = heads // shared * SIZE
        self.q, self.k = nn.Linear(WIDTH, heads * SIZE), nn.Linear(WIDTH, keys)
        self.v, self.o = nn.Linear(WIDTH, keys), nn.Linear(heads * SIZE, 3)
        self.scores = torch.zeros(0)

    def split(self, x, heads):
        return x.view(*x.shape[:2], heads, -1).transpose(1, 2)

    def turn(self, x):
        """Rotate the halves of every head by an angle that goes with the position."""
        half = x.shape[-1] // 2
        angle = torch.arange(x.shape[2], dtype=x.dtype)[:, None] * 0.7 ** torch.arange(half, dtype=x.dtype)
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    def operands(self, x):
        q, k = self.split(self.q(x), self.heads), self.split(self.k(x), self.heads // self.shared)
        if self.turned:
            q, k = self.turn(q), self.turn(k)
        return q, k.repeat_interleave(self.shared, 1)

    def forward(self, x):
        q, k = self.operands(x)
        v = self.split(self.v(x), self.heads // self.shared).repeat_interleave(self.shared, 1)
        return self.o(((q @ k.transpose(-1, -2) / SIZE**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2))


def observed(net, x, structure=None, run=replay, passes=1):
    structure = analyse(net, (x[:2],)) if structure is None else structure
    groups = [g for g in structure.groups if g.pin is None]
    observer = Observer(net, groups, seed=0, exact=True, any_mode=True, replay=run)
    observer.open()
    with torch.no_grad():
        for _ in range(passes):
            net.eval()(x)
            observer.end_step()
    observer.close()
    return structure, observer.observations()


def request(tolerance, **given):
    found = {"criterion": get_criterion("interpolative"), "align": 1, "max_drop": 1.0, "seed": 0}
    return Request(tolerance=tolerance, **(found | given))


def query_group(structure):
    return next(g for g in structure.groups if any(site.kind == "product" for site in g.sites))


def all_scores(q, k):
    """Scores of every query of the data with every key of it, head by head: what independent positions mean."""
    q, k = (t.transpose(0, 1).flatten(1, 2) for t in (q, k))
    return q @ k.transpose(-1, -2)


def measured(net, x, group, reduction):
    """Relative rms change of all scores when queries keep their channels and keys take the others over."""
    q, k = (t.detach() for t in net.operands(x))
    before = all_scores(q, k)
    per_row = group.num_channels // group.rows
    (found,) = reduction.sites.values()
    rows = [(reduction.keep // per_row == row).nonzero().squeeze(1) for row in range(group.rows)]
    heads = []
    for head in range(net.heads):
        row = head // net.shared if group.rows > 1 else 0
        own = reduction.keep[rows[row]]
        mix = found.mix[rows[row]][:, row * per_row : (row + 1) * per_row]
        heads.append(q[:, head][..., own % per_row] @ mix)
    after = all_scores(torch.stack(heads, 1), k)
    second = before.square().mean((1, 2)).sum() - _mean_key(q, k)
    return float(((after - before).square().mean((1, 2)).sum() / second).sqrt())


def _mean_key(q, k):
    q, k = (t.transpose(0, 1).flatten(1, 2) for t in (q, k))
    return torch.einsum("hnd,hd->hn", q, k.mean(1)).square().mean(1).sum()


@pytest.mark.parametrize("shared", [1, 2, 4])
@criteria_of_products
def test_the_certificate_of_a_product_is_the_measured_change_of_all_scores(runs, shared, criterion):
    net = Attention(shared).double()
    with torch.no_grad():  # one channel of every head nearly follows another
        for head in range(HEADS):
            row = head * SIZE
            net.q.weight[row + 3] = 1.5 * net.q.weight[row] + 1e-2 * net.q.weight[row + 1]
            net.q.bias[row + 3] = 1.5 * net.q.bias[row]
            net.q.weight[row + 4] *= 1e-2
            net.q.bias[row + 4] *= 1e-2
    x = runs.inputs(300, 3, (LENGTH, WIDTH)).double()
    structure, observations = observed(net, x)
    group = query_group(structure)
    # All positions instead of a sample, so that the certificate can be met exactly.
    key = (group.name, group.sites[0].key)
    q, k = (t.detach().transpose(1, 2).flatten(2).flatten(0, 1) for t in net.operands(x))
    places = torch.from_numpy(group.sites[0].input_columns.reshape(-1))
    for moments, rows in ((observations[key].moments, q), (observations[key].right, k)):
        fresh = type(moments)(moments.num_channels)
        fresh.update(rows[:, places], exact=True)
        moments.load_state_dict(fresh.state_dict())
    plan = make_plan(net, structure, observations, request(0.5, criterion=get_criterion(criterion)))
    reduction = next((r for r in plan.reductions if r.group == group.name), None)
    if reduction is None:
        assert criterion in ("magnitude", "random")
        return
    counts = torch.bincount(reduction.keep // (group.num_channels // group.rows), minlength=group.rows)
    assert len(set(counts.tolist())) == 1
    (certificate,) = plan.certificates[group.name]
    assert "scores" in certificate.note
    assert certificate.value == pytest.approx(measured(net, x, group, reduction), rel=1e-6)
    assert certificate.value <= 0.5


@pytest.mark.parametrize("shared", [1, 2, 4])
def test_planted_queries_go_at_tolerance_zero(runs, shared):
    net = Attention(shared).double()
    with torch.no_grad():
        for head in range(HEADS):
            row = head * SIZE
            for leaf in (net.q.weight, net.q.bias):
                leaf[row + 3] = 2.0 * leaf[row] - leaf[row + 1]
                leaf[row + 5] = 0.0
    x = runs.inputs(300, 3, (LENGTH, WIDTH)).double()
    structure, observations = observed(net, x)
    group = query_group(structure)
    plan = make_plan(net, structure, observations, request(0.0))
    before, after = plan.widths[group.name]
    assert after == before * 4 // 6
    (reduction,) = (r for r in plan.reductions if r.group == group.name)
    assert measured(net, x, group, reduction) < 1e-6


def turned_structure(net):
    """Queries and keys behind a rotation, as capture would describe them: halves tie, over all heads."""
    half = SIZE // 2
    places = (np.arange(half)[:, None] + np.arange(2 * HEADS)[None, :] * half).astype(np.int64)
    site = ProductSite(
        module="", weight="", dim=0, bias=None, columns=np.zeros((half, 0), dtype=np.int64),
        input_columns=places, num_columns=0, macs=100.0, per_sum=SIZE,
    )  # fmt: skip
    members = tuple(
        Member(tensor=name, dim=0, positions=places, role="producer" if "weight" in name else "bias")
        for name in ("q.weight", "q.bias", "k.weight", "k.bias")
    )
    group = Group(name="q", num_channels=half, members=members, sites=(site,))
    shapes = {name: tuple(p.shape) for name, p in net.named_parameters()}
    return Structure(groups=(group,), macs=1000.0, shapes=shapes)


def test_behind_a_rotation_channels_are_sliced_and_what_is_lost_is_measured(runs):
    net = Attention(turned=True).double()
    with torch.no_grad():
        for head in range(HEADS):
            for part in (0, SIZE // 2):
                row = head * SIZE + part + 1
                net.q.weight[row] *= 0.2
                net.q.bias[row] *= 0.2
    x = runs.inputs(300, 3, (LENGTH, WIDTH)).double()
    structure = turned_structure(net)
    (group,) = structure.groups
    key = group.sites[0].key

    def run(model, args, kwargs, watch, *, training):
        q, k = (t.detach().transpose(1, 2).flatten(2) for t in model.operands(*args))
        watch(Seen(site=key, x=q, right=k))

    _, observations = observed(net, x, structure, run)
    plan = make_plan(net, structure, observations, request(0.4))
    (reduction,) = plan.reductions
    assert reduction.keep.tolist() == [0, 2]
    assert torch.equal(reduction.sites[key].mix, torch.eye(3, dtype=torch.float64)[reduction.keep])
    assert plan.macs_after == pytest.approx(1000.0 - 100.0)
    seen = observations["q", key]
    q, k = (t.detach() for t in net.operands(x))
    removed = torch.tensor([1, 4])
    change = all_scores(q[..., removed], k[..., removed]).square().mean((1, 2)).sum()
    want = float((change / (all_scores(q, k).square().mean((1, 2)).sum() - _mean_key(q, k))).sqrt())
    assert plan.errors["q"][key] == pytest.approx(want, rel=1e-6)
    assert seen.moments.num_rows == 1500
    assert make_plan(net, structure, observations, request(0.05)).reductions == ()


def test_keys_of_other_rows_never_take_over(runs):
    net = Attention().double()
    with torch.no_grad():  # whole heads are copies: across heads everything is redundant, within them nothing
        for leaf in (net.q.weight, net.q.bias):
            leaf[SIZE:] = leaf[:SIZE].repeat(HEADS - 1, *[1] * (leaf.dim() - 1))
    x = runs.inputs(300, 3, (LENGTH, WIDTH)).double()
    structure, observations = observed(net, x)
    plan = make_plan(net, structure, observations, request(0.0))
    assert query_group(structure).name not in plan.widths


def test_whole_heads_or_channels_inside_them_whichever_saves_more(runs):
    x = runs.inputs(300, 3, (LENGTH, WIDTH)).double()

    def plan_for(change, tolerance=0.0):
        net = Attention().double()
        with torch.no_grad():
            change(net)
        structure, observations = observed(net, x, passes=2)
        return structure, make_plan(net, structure, observations, request(tolerance))

    def double_head(net):
        for layer in (net.q, net.k, net.v):
            for leaf in (layer.weight, layer.bias):
                leaf[:SIZE] = leaf[SIZE : 2 * SIZE]

    def double_channels(net):
        for head in range(HEADS):
            for leaf in (net.v.weight, net.v.bias):
                leaf[head * SIZE : head * SIZE + 5] = leaf[head * SIZE + 5]

    structure, plan = plan_for(double_head)
    (heads,) = (g for g in structure.groups if g.name.endswith(":heads"))
    assert plan.widths == {heads.name: (HEADS, HEADS - 1)}
    assert set(heads.conflicts_with) == {"q", "v"}
    assert all(any(note.startswith(name + ":") for note in plan.notes) for name in heads.conflicts_with)
    structure, plan = plan_for(double_channels)
    assert plan.widths == {"v": (HEADS * SIZE, HEADS)}
    assert any(note.startswith(heads.name) for note in plan.notes)

    def both(net):
        double_channels(net)
        double_head(net)

    _, plan = plan_for(both)
    assert plan.widths == {"v": (HEADS * SIZE, HEADS)}
    assert [note for note in plan.notes if note.startswith(heads.name)] == [
        f"{heads.name}: left for another event: changing v saves more"
    ]


def test_alternatives_do_not_share_the_tolerance_of_a_site(runs):
    net = Attention().double()
    x = runs.inputs(300, 3, (LENGTH, WIDTH)).double()
    structure, observations = observed(net, x, passes=2)
    alone = replace(
        structure, groups=tuple(replace(g, conflicts_with=()) for g in structure.groups if ":" not in g.name)
    )
    with_heads = make_plan(net, structure, observations, request(0.3))
    without = make_plan(net, alone, observations, request(0.3))
    assert with_heads.widths["v"] == without.widths["v"]


class Experts(nn.Module):
    """A stack of experts with one hidden width, read slice by slice."""

    def __init__(self, hidden=12):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Parameter(torch.randn(3, hidden, 6)), nn.Parameter(torch.randn(3, 4, hidden))

    def hidden(self, x):
        return [torch.tanh(functional.linear(x, up)) for up in self.up]

    def forward(self, x):
        return torch.stack([functional.linear(h, down) for h, down in zip(self.hidden(x), self.down, strict=True)], 1)


def test_every_expert_is_planned_by_its_own_slice(runs):
    net = Experts().double()
    with torch.no_grad():
        net.up[:, 9:] = net.up[:, :3]
    x = runs.inputs(256, 3).double()  # as many as are wanted: then all of them are taken
    structure, observations = observed(net, x)
    (group,) = (g for g in structure.groups if g.pin is None)
    assert [site.select for site in group.sites] == [((0, 0),), ((0, 1),), ((0, 2),)]
    plan = make_plan(net, structure, observations, request(0.0))
    assert plan.widths == {group.name: (12, 9)}
    assert plan.macs_after == pytest.approx(plan.macs_before * 9 / 12)
    plan = make_plan(net, structure, observations, request(0.4))
    (reduction,) = plan.reductions
    assert len(reduction.keep) < 9
    for number, (site, h) in enumerate(zip(group.sites, net.hidden(x), strict=True)):
        found = reduction.sites[site.key]
        assert found.offset is None
        h = h.detach()
        change = (h - h[:, reduction.keep] @ found.mix) @ net.down[number].detach().T
        energy = ((h - h.mean(0)) @ net.down[number].detach().T).square().sum()
        want = float((change.square().sum() / energy).sqrt())
        assert plan.errors[group.name][site.key] == pytest.approx(want, rel=1e-4)


def test_costs_of_a_weight_that_two_modules_read_count_once(runs):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 3)
            self.c.weight = self.b.weight

        def forward(self, x):
            h = torch.relu(self.a(x))
            return self.b(h) + self.c(h)

    structure = analyse(Twice(), (runs.inputs(2, 0),))
    assert structure.macs == 2 * (6 * 8 + 2 * 8 * 3)
    assert macs_after(structure, {"a": 4}) == structure.macs / 2


def test_products_and_heads_enter_the_cost(runs):
    net = Attention()
    x = runs.inputs(2, 0, (LENGTH, WIDTH))
    structure = analyse(net, (x,))
    tokens, pairs = 2 * LENGTH, 2 * LENGTH * LENGTH
    inner = HEADS * SIZE
    scores = pairs * inner
    assert structure.macs == tokens * (3 * WIDTH * inner + 3 * inner) + 2 * scores
    narrower = macs_after(structure, {"q": HEADS * 3})
    assert structure.macs - narrower == pytest.approx(tokens * WIDTH * inner + scores / 2)
    summed = macs_after(structure, {"v": HEADS * 3})
    assert structure.macs - summed == pytest.approx(tokens * (WIDTH * inner + 3 * inner) / 2 + scores / 2)
    fewer = macs_after(structure, {":heads": 3})
    assert structure.macs - fewer == pytest.approx((tokens * (3 * WIDTH * inner + 3 * inner) + 2 * scores) / 4)


def of_one_width(structure, *names, also=()):
    """Say that the groups of these names are as wide as one another (and as others that are not there)."""
    groups = [
        replace(g, tied_groups=tuple(n for n in (*names, *also) if n != g.name)) if g.name in names else g
        for g in structure.groups
    ]
    return replace(structure, groups=tuple(groups))


def two_widths(runs, queries=2, values=1, shared=1):
    """Queries of which so many per head are redundant, and values of which others are."""
    net = Attention(shared).double()
    with torch.no_grad():
        for layer, count in ((net.q, queries), (net.v, values)):
            for leaf in (layer.weight, layer.bias):
                for row in range(0, len(leaf), SIZE):
                    leaf[row + 1 : row + 1 + count] = leaf[row]
    return net, runs.inputs(300, 3, (LENGTH, WIDTH)).double()


@pytest.mark.parametrize("shared", [1, 2, 4])
def test_groups_of_one_width_keep_the_same_share_as_the_one_that_needs_most(runs, shared):
    net, x = two_widths(runs, shared=shared)
    structure, observations = observed(net, x, passes=2)
    name = query_group(structure).name
    free = make_plan(net, structure, observations, request(0.0)).widths
    assert free[name][1] * 6 == free[name][0] * 4
    assert free["v"][1] * 6 == free["v"][0] * 5
    plan = make_plan(net, of_one_width(structure, name, "v"), observations, request(0.0))
    assert plan.widths == {group: (before, before * 5 // 6) for group, (before, _) in free.items()}
    assert all(error < 1e-6 for errors in plan.errors.values() for error in errors.values())


def test_where_one_of_them_stays_all_stay(runs):
    net, x = two_widths(runs, values=0)
    structure, observations = observed(net, x, passes=2)
    plan = make_plan(net, of_one_width(structure, "q", "v"), observations, request(0.0))
    assert plan.widths == {}
    assert [note for note in plan.notes if note.startswith("q: as wide as v")]
    plan = make_plan(net, of_one_width(structure, "q", also=("gone",)), observations, request(0.0))
    assert "q: as wide as gone, which cannot change now" in plan.notes


def test_widths_of_one_number_are_aligned_together(runs):
    net, x = two_widths(runs, queries=4, values=3)
    structure, observations = observed(net, x, passes=2)
    plan = make_plan(net, of_one_width(structure, "q", "v"), observations, request(0.0, align=8))
    assert plan.widths == {"q": (24, 16), "v": (24, 16)}
    pairs = replace(query_group(structure), num_channels=12)  # a rotary pair is a channel of two columns
    view = {group.name: make_view(net, group, observations, 0).view for group in structure.groups if group.name == "v"}[
        "v"
    ]
    half = replace(view, num_channels=12, sites=(replace(view.sites[0], weight=torch.ones(1, 12, 1), moments=None),))
    values = next(g for g in structure.groups if g.name == "v")
    assert common_steps([pairs, values], [half, view], 1) == [4, 8]
    units = units_of(of_one_width(structure, "q", "v").groups)
    assert [[g.name for g in unit] for unit in units if len(unit) > 1] == [["q", "v"]]


class Flattened(nn.Module):
    """A map that is flattened into a weight without a module, the right way round or transposed."""

    def __init__(self, transposed):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.transposed = nn.Conv1d(2, 12, 3), transposed
        self.weight, self.bias = nn.Parameter(torch.randn(5, 12 * 4) / 7), nn.Parameter(torch.zeros(5))
        if transposed:
            self.weight.data = self.weight.data.T.contiguous()

    def forward(self, x):
        h = torch.tanh(self.conv(x)).flatten(1)
        return (
            torch.addmm(self.bias, h, self.weight) if self.transposed else functional.linear(h, self.weight, self.bias)
        )


@pytest.mark.parametrize("transposed", [False, True])
def test_several_positions_of_a_functional_consumer_are_measured_on_whole_inputs(runs, transposed):
    net = Flattened(transposed).double().eval()
    x = runs.inputs(64, 3, (2, 6)).double()  # as many as are kept whole
    before = net(x).detach()
    structure, _ = observed(net, x)
    (site,) = next(g for g in structure.groups if g.pin is None).sites
    assert (site.functional, site.columns.shape) == (True, (12, 4))
    event = shrink_(net, x[:2], [x], tolerance=0.3)
    assert event.groups["conv"][1] < 12
    change = (net(x).detach() - before).square().sum()
    (certificate,) = (c for c in event.certificates if c.kind == "empirical")
    measured = float((change / (before - before.mean(0)).square().sum()).sqrt())
    assert certificate.value == pytest.approx(measured, rel=1e-4)


def test_whole_heads_that_go_along_with_one_another_are_one_choice() -> None:
    def group(name: str, conflicts_with: tuple[str, ...], equal: tuple[str, ...] = ()) -> Group:
        return Group(name=name, num_channels=4, members=(), sites=(), conflicts_with=conflicts_with, tied_groups=equal)

    groups = [group("q", ("a",)), group("p", ("b",)), group("a", ("q",), ("b",)), group("b", ("p",), ("a",))]
    (task,) = tasks_of(groups)
    assert [[one.name for unit in units for one in unit] for units in task.sets] == [["q", "p"], ["a", "b"]]
