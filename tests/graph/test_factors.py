"""Scores scaled by numbers that follow a size: what makes up for them, and what is refused because nothing does."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apoptosis.errors import StructureChangedError
from apoptosis.graph import analyse, verify, verify_up_to_scale
from apoptosis.records import Group, Reduction, SiteReduction, Structure, TensorEdit
from apoptosis.surgery import Transaction, build_edits

X = torch.randn(4, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
HEADS, SIZE, LEFT = 2, 4, 3

Way = Callable[["Scores", Tensor, Tensor, Tensor], Tensor]


class Scores(nn.Module):
    """Attention; `way` makes of queries, keys and values what the last layer reads."""

    def __init__(self, way: Way, size: int = SIZE) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.way, self.scale = way, size**-0.5
        self.q, self.k, self.v = (nn.Linear(8, HEADS * size) for _ in range(3))
        self.o = nn.Linear(HEADS * size, 8)
        self.temperature = nn.Parameter(torch.tensor(0.7))
        self.register_buffer("bias", torch.rand(5, 5))
        angles = torch.rand(5, size // 2).repeat(1, 2)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.o(self.way(self, q, k, v).transpose(1, 2).flatten(2)).tanh()


def mixed(scores: Tensor, v: Tensor) -> Tensor:
    return scores.softmax(-1) @ v


def in_place(m: Scores, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    scores /= math.sqrt(k.size(-1))
    scores.mul_(2.0)
    return mixed(scores, v)


def in_place_by_a_view(m: Scores, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    scores.view(-1).mul_(k.size(-1) ** -0.5)
    return mixed(scores, v)


def rotated(m: Scores, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def turn(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * m.cos + torch.cat([-second, first], -1) * m.sin

    return mixed(turn(q * q.size(-1) ** -0.5) @ turn(k).mT, v)


def full(number: float) -> Tensor:
    return torch.full([], number, dtype=torch.float64)


KEPT: dict[str, Way] = {
    "divided": lambda m, q, k, v: mixed(q @ k.mT / math.sqrt(q.size(-1)), v),
    "times": lambda m, q, k, v: mixed((q @ k.mT) * (1.0 / math.sqrt(k.size(-1))), v),
    "by the size": lambda m, q, k, v: mixed(q @ k.mT / k.shape[-1], v),
    "of the weight": lambda m, q, k, v: mixed(q @ k.mT * (m.q.out_features // HEADS) ** -0.5, v),
    "queries": lambda m, q, k, v: mixed((q / math.sqrt(q.size(-1))) @ k.mT, v),
    "keys": lambda m, q, k, v: mixed(q @ (k * k.size(-1) ** -0.5).mT, v),
    "both": lambda m, q, k, v: mixed((q * q.size(-1) ** -0.25) @ (k * q.size(-1) ** -0.25).mT, v),
    "before and after": lambda m, q, k, v: mixed((q * q.size(-1) ** -0.25) @ k.mT * q.size(-1) ** -0.25, v),
    "negative": lambda m, q, k, v: mixed(-(q @ k.mT) / -math.sqrt(q.size(-1)), v),
    "full": lambda m, q, k, v: mixed(q @ k.mT / full(q.size(-1) ** 0.5), v),
    "root of a tensor": lambda m, q, k, v: mixed(q @ k.mT / full(q.size(-1)).sqrt(), v),
    "inverse root": lambda m, q, k, v: mixed(q @ k.mT * torch.tensor(q.size(-1), dtype=q.dtype).rsqrt(), v),
    "in place": in_place,
    "masked": lambda m, q, k, v: mixed((q @ k.mT / q.size(-1) ** 0.5).masked_fill(m.bias > 0.8, -1e9), v),
    "bias": lambda m, q, k, v: mixed(q @ k.mT / q.size(-1) ** 0.5 + m.bias, v),
    "temperature": lambda m, q, k, v: mixed(q @ k.mT * m.temperature / q.size(-1) ** 0.5, v),
    "einsum": lambda m, q, k, v: mixed(torch.einsum("bhqd,bhkd->bhqk", q, k) / q.size(-1) ** 0.5, v),
    "fused": lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, scale=1.0 / q.size(-1)),
    "fused, by its own scale": lambda m, q, k, v: F.scaled_dot_product_attention(q / q.size(-1), k, v),
    "in place, by a view": in_place_by_a_view,
    "fused, queries": lambda m, q, k, v: F.scaled_dot_product_attention(q / q.size(-1), k, v, scale=1.0),
    "two products alike": lambda m, q, k, v: mixed((q / q.size(-1) ** 0.5) @ k.mT + (q @ k.mT) / q.size(-1) ** 0.5, v),
    "keys behind an activation": lambda m, q, k, v: mixed(q @ k.tanh().mT / q.size(-1) ** 0.5, v),
    "queries behind an activation": lambda m, q, k, v: mixed(q.tanh() @ k.mT / q.size(-1) ** 0.5, v),
}
TWO = "which does not scale all that reads a product of activations"
ELSEWHERE = "which scales more than a product of activations"
NO_SIDE = "neither side of which scales with weights of its own alone"
REFUSED: dict[str, tuple[Way, str]] = {
    "no root": (lambda m, q, k, v: mixed(q @ k.mT / (q.size(-1) ** 0.5 + 1.0), v), "not with the root of a number"),
    "bias before": (lambda m, q, k, v: mixed((q @ k.mT + m.bias) / q.size(-1) ** 0.5, v), "uses the number"),
    "scores as they are": (lambda m, q, k, v: mixed((s := q @ k.mT) / q.size(-1) ** 0.5, v) + s.sum() / 99, TWO),
    "no linear side": (lambda m, q, k, v: mixed(q.tanh() @ k.tanh().mT / q.size(-1) ** 0.5, v), NO_SIDE),
    "queries elsewhere": (
        lambda m, q, k, v: mixed(q @ k.tanh().mT / q.size(-1) ** 0.5, v) + m.o(q.transpose(1, 2).flatten(2)).mean(),
        NO_SIDE,
    ),
    "two products": (
        lambda m, q, k, v: mixed(q @ k.tanh().mT / q.size(-1) ** 0.5, v) + (q @ k.sin().mT).mean(),
        TWO,
    ),
    "another number": (
        lambda m, q, k, v: mixed(q @ k.mT / q.size(-1) ** 0.5, v) * q.size(-1),
        f"aten.mul.*{ELSEWHERE}",
    ),
    "a literal twice": (
        lambda m, q, k, v: mixed(q @ k.mT / (t := full(q.size(-1) ** 0.5)), v).tanh() * t,
        ELSEWHERE,
    ),
    "scaled queries elsewhere": (
        lambda m, q, k, v: mixed((s := q / q.size(-1) ** 0.5) @ k.mT, v) + m.o(s.transpose(1, 2).flatten(2)).mean(),
        ELSEWHERE,
    ),
    "added to something": (
        lambda m, q, k, v: mixed(
            q @ k.mT / q.size(-1) ** 0.5
            + torch.baddbmm(m.bias[None].expand(8, 5, 5), q.flatten(0, 1), k.flatten(0, 1).mT).unflatten(0, (4, 2)),
            v,
        ),
        TWO,
    ),
    "one mode": (
        lambda m, q, k, v: mixed(q @ k.mT * (q.size(-1) ** -0.5 if m.training else m.scale), v),
        TWO,
    ),
}  # fmt: skip


def named(structure: Structure, name: str) -> Group:
    return next(g for g in structure.groups if g.name == name)


def without_the_last(group: Group) -> Reduction:
    """Take the last channel of every row out, with nothing in its place."""
    length = group.num_channels // group.rows
    keep = torch.tensor([c for c in range(group.num_channels) if c % length < length - 1])
    mix = torch.eye(group.num_channels, dtype=torch.float64)[keep]
    return Reduction(
        group=group.name, keep=keep, sites={site.key: SiteReduction(mix=mix, offset=None) for site in group.sites}
    )


def silence(model: nn.Module, group: Group) -> None:
    """Set to zero what makes the last channel of every row."""
    length = group.num_channels // group.rows
    gone = [c for c in range(group.num_channels) if c % length == length - 1]
    with torch.no_grad():
        for member in group.members:
            if member.role != "channelwise":
                places = torch.from_numpy(member.positions[gone].reshape(-1))
                model.get_parameter(member.tensor).index_fill_(member.dim, places, 0.0)


def operated(
    model: nn.Module, names: tuple[str, ...], optimizer: torch.optim.Optimizer | None = None
) -> tuple[nn.Module, nn.Module, tuple[TensorEdit, ...]]:
    """The model with silent channels, the model without them, and what made up for numbers."""
    before = analyse(model, (X,), {})
    groups = [named(before, name) for name in names]
    for group in groups:
        silence(model, group)
    silent = copy.deepcopy(model)
    edits = build_edits(before, [without_the_last(group) for group in groups])
    with Transaction(model, () if optimizer is None else (optimizer,)) as transaction:
        transaction.apply(edits, before)
        kept = {edit.tensor: edit.keep for edit in edits}
        after = analyse(model, (X,), {})
        with pytest.raises(StructureChangedError, match="uses the number"):
            verify(before, after, kept)
        made_up = verify_up_to_scale(before, after, kept)
        transaction.rescale(made_up)
        transaction.commit()
    return silent, model, made_up


def same_outputs(silent: nn.Module, small: nn.Module) -> None:
    for training in (True, False):
        with torch.no_grad():
            expected, found = (net.train(training)(X) for net in (silent, small))
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", KEPT)
def test_weights_take_the_factor(name: str) -> None:
    silent, small, made_up = operated(Scores(KEPT[name]), ("q",))
    side = "k" if name == "queries behind an activation" else "q"
    assert {edit.tensor for edit in made_up} == {f"{side}.weight", f"{side}.bias"}
    root = 1.0 if name in ("by the size", "fused", "fused, queries", "fused, by its own scale") else 0.5
    for edit in made_up:
        (scale,) = edit.scales
        assert scale.factor == pytest.approx((LEFT / SIZE) ** root, rel=1e-12)
        assert scale.positions.tolist() == list(range(HEADS * LEFT))
        assert not edit.keep
    same_outputs(silent, small)


def test_pairs_that_are_rotated_take_the_factor_in_front_of_the_rotation() -> None:
    silent, small, made_up = operated(Scores(rotated, size=6), ("q",))
    assert made_up[0].scales[0].factor == pytest.approx((4 / 6) ** 0.5)
    assert {edit.tensor for edit in made_up} == {"q.weight", "q.bias"}
    same_outputs(silent, small)


def test_the_size_may_be_that_of_other_channels() -> None:
    """GPT-2 divides by the root of the number of values: they may go on their own, and the queries take the factor."""
    model = Scores(lambda m, q, k, v: mixed(q @ k.mT / full(v.size(-1) ** 0.5), v))
    silent, small, made_up = operated(model, ("v",))
    assert {edit.tensor for edit in made_up} == {"q.weight", "q.bias"}
    same_outputs(silent, small)
    silent, small, made_up = operated(Scores(KEPT["divided"]), ("q", "v"))
    assert made_up[0].scales[0].factor == pytest.approx((LEFT / SIZE) ** 0.5)
    same_outputs(silent, small)


def test_values_alone_leave_the_scale_of_the_queries_alone() -> None:
    model = Scores(KEPT["divided"])
    before = analyse(model, (X,), {})
    group = named(before, "v")
    silence(model, group)
    silent = copy.deepcopy(model)
    edits = build_edits(before, [without_the_last(group)])
    with Transaction(model) as transaction:
        transaction.apply(edits, before)
        assert verify_up_to_scale(before, analyse(model, (X,), {}), {e.tensor: e.keep for e in edits}) == ()
        transaction.commit()
    same_outputs(silent, model)


@pytest.mark.parametrize("name", REFUSED)
def test_other_numbers_are_refused(name: str) -> None:
    way, text = REFUSED[name]
    with pytest.raises(StructureChangedError, match=text) as caught:
        operated(Scores(way), ("q",))
    assert "test_factors.py:" in str(caught.value)
    assert str(caught.value).endswith("the model computes with sizes.")
    assert ("a scale that is an attribute" in str(caught.value)) == (name != "bias before")


def test_one_product_called_twice_takes_one_factor() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Scores(KEPT["before and after"])

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(self.inner(x))

    silent, small, made_up = operated(Twice(), ("inner.q",))
    assert {edit.tensor for edit in made_up} == {"inner.q.weight", "inner.q.bias"}
    same_outputs(silent, small)


def test_numbers_that_cancel_need_nothing() -> None:
    silent, small, made_up = operated(
        Scores(lambda m, q, k, v: mixed((q * q.size(-1)) @ k.mT / k.size(-1) * 0.5, v)), ("q",)
    )
    assert made_up == ()
    same_outputs(silent, small)


def test_state_of_the_optimizer_follows_the_factor() -> None:
    model = Scores(KEPT["divided"])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0)
    model(X).square().sum().backward()
    optimizer.step()
    state = {key: optimizer.state[model.k.weight][key].clone() for key in ("exp_avg", "exp_avg_sq")}
    queries = {key: optimizer.state[model.q.weight][key].clone() for key in ("exp_avg", "exp_avg_sq")}
    model.zero_grad()
    silent, small, _ = operated(model, ("q",), optimizer)
    rows, factor = [0, 1, 2, 4, 5, 6], (LEFT / SIZE) ** 0.5
    for key, power in (("exp_avg", 1), ("exp_avg_sq", 2)):
        torch.testing.assert_close(optimizer.state[small.q.weight][key], queries[key][rows] / factor**power)
        torch.testing.assert_close(optimizer.state[small.k.weight][key], state[key][rows])
    for net in (silent, small):
        net.train()(X).square().sum().backward()
    torch.testing.assert_close(small.q.weight.grad * factor, silent.q.weight.grad[rows])
    torch.testing.assert_close(small.k.weight.grad, silent.k.weight.grad[rows])


def test_a_second_edit_starts_from_the_first() -> None:
    _, small, first = operated(Scores(KEPT["times"]), ("q",))
    silent, smaller, second = operated(small, ("q",))
    assert smaller.q.out_features == HEADS * 2
    assert second[0].scales[0].factor == pytest.approx((2 / 3) ** 0.5)
    assert first[0].scales[0].factor == pytest.approx((3 / 4) ** 0.5)
    same_outputs(silent, smaller)


def test_only_scales_are_taken_after_an_edit() -> None:
    net = nn.Linear(2, 3)
    with Transaction(net) as transaction:
        with pytest.raises(ValueError, match="scales alone"):
            transaction.rescale([TensorEdit(tensor="weight", keep={0: torch.tensor([0])})])
        transaction.rescale([])
    assert net.weight.shape == (3, 2)
