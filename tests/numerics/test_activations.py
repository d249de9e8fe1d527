"""Every activation of torch.nn has a row in the table, and nobody can break what the row claims."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from apoptosis.errors import ArgumentError
from apoptosis.numerics.activations import (
    NEURON_TYPES,
    NOT_ELEMENTWISE,
    Symmetry,
    broken_claim,
    neuron_type,
    register_neuron_type,
)

BOUNDED = st.floats(-30, 30, allow_nan=False)
VARIANTS: dict[str, list[tuple[float, ...]]] = {
    "leaky_relu": [(), (0.0,), (-0.5,), (1.0,), (3.0,)],
    "prelu": [(), (-1.5,)],
    "rrelu": [(), (-2.0, 0.5)],
    "threshold": [(), (1.0, 1.0), (0.5, 2.0), (-1.0, 20.0)],
    "hardtanh": [(), (-2.0, 2.0), (0.0, 6.0), (0.0, math.inf), (-1.0, 3.0), (1.0, 3.0)],
    "softshrink": [(), (0.0,), (2.0,)],
    "hardshrink": [(), (0.0,), (2.0,)],
    "softplus": [(), (2.0, 5.0), (0.5, 1.0)],
    "elu": [(), (0.5,), (2.0,), (1.0, 2.0, 3.0), (-1.0,), (0.0, 1.0, 1.0)],
    "celu": [(), (0.3,), (3.0,)],
}
CASES = [(name, args) for name in NEURON_TYPES for args in VARIANTS.get(name, [()])]
every_case = pytest.mark.parametrize(("name", "args"), CASES, ids=str)
MODULES: dict[str, nn.Module] = {"GELU": nn.GELU(), "Threshold": nn.Threshold(0.5, 2.0), "PReLU": nn.PReLU(1, 0.25)}
MODULE_ARGS: dict[str, tuple[float, ...]] = {"threshold": (0.5, 2.0)}


def apply(name: str, args: tuple[float, ...], *values: float) -> list[float]:
    kind = neuron_type(name)
    return kind.phi(torch.tensor(values, dtype=torch.float64), *kind.fill(args)).tolist()


def test_every_activation_of_torch_nn_is_in_the_table_or_named_as_not_elementwise() -> None:
    known = {kind.module for kind in NEURON_TYPES.values()} | set(NOT_ELEMENTWISE)
    assert set(nn.modules.activation.__all__) - known == set()
    for name in NOT_ELEMENTWISE:
        assert name in nn.modules.activation.__all__
        assert name not in {kind.module for kind in NEURON_TYPES.values()}


@pytest.mark.parametrize("name", [name for name, kind in NEURON_TYPES.items() if kind.module and name != "gelu_tanh"])
def test_phi_is_the_module_in_evaluation(name: str) -> None:
    kind = neuron_type(name)
    module = MODULES[kind.module] if kind.module in MODULES else getattr(nn, kind.module)()
    x = torch.linspace(-25, 25, 4001)
    got = kind.phi(x, *kind.fill(MODULE_ARGS.get(name, ())))
    torch.testing.assert_close(got, module.eval()(x).detach(), rtol=1e-5, atol=1e-6)


def test_gelu_tanh_is_the_approximate_module() -> None:
    x = torch.linspace(-5, 5, 101)
    torch.testing.assert_close(neuron_type("gelu_tanh").phi(x), nn.GELU("tanh")(x))


@every_case
@given(a=BOUNDED, b=BOUNDED)
@settings(max_examples=60, deadline=None)
def test_nobody_breaks_the_lipschitz_constant(name: str, args: tuple[float, ...], a: float, b: float) -> None:
    kind = neuron_type(name)
    full = kind.fill(args)
    left, right = apply(name, args, a, b)
    limit = kind.lipschitz(*full) * abs(a - b) + kind.jump(*full)
    assert abs(left - right) <= limit * (1 + 1e-12) + 1e-13


@every_case
def test_the_lipschitz_constant_is_no_larger_than_needed(name: str, args: tuple[float, ...]) -> None:
    kind = neuron_type(name)
    full = kind.fill(args)
    if name == "rrelu":  # the table speaks of every slope it may draw
        return
    x = torch.linspace(-30, 30, 600_001, dtype=torch.float64)
    steps = kind.phi(x, *full).diff().abs()
    steepest = float(steps[steps < 0.05].max() / x.diff()[0])  # a jump is not a slope
    assert steepest >= 0.98 * kind.lipschitz(*full)
    jumped = float(steps.max()) >= 0.5 * kind.jump(*full)
    assert jumped or kind.jump(*full) < 1e-8


@every_case
@given(x=BOUNDED, s=st.floats(1e-3, 1e3))
@settings(max_examples=40, deadline=None)
def test_nobody_breaks_a_symmetry(name: str, args: tuple[float, ...], x: float, s: float) -> None:
    symmetry = neuron_type(name).symmetry(*neuron_type(name).fill(args))
    here, scaled, mirrored = apply(name, args, x, s * x, -x)
    if symmetry.homogeneous:
        assert scaled == pytest.approx(s * here, rel=1e-12, abs=1e-300)
    if symmetry.reflection is not None:
        assert mirrored == pytest.approx(symmetry.reflection - here, rel=1e-12, abs=1e-12)


@every_case
def test_no_symmetry_is_overlooked(name: str, args: tuple[float, ...]) -> None:
    kind = neuron_type(name)
    full = kind.fill(args)
    symmetry = kind.symmetry(*full)
    x = torch.linspace(0.01, 30, 3001, dtype=torch.float64)
    x = torch.cat([-x, x])
    value = kind.phi(x, *full)
    homogeneous = torch.allclose(kind.phi(2.5 * x, *full), 2.5 * value, rtol=1e-10, atol=1e-12)
    both = value + kind.phi(-x, *full)
    point = bool((both - both[0]).abs().max() < 1e-10)
    if name == "rrelu":
        assert symmetry.homogeneous is False  # in training every element draws its own slope
        return
    assert symmetry.homogeneous == homogeneous
    assert (symmetry.reflection is not None) == point


def test_unknown_names_and_too_many_arguments_are_refused() -> None:
    with pytest.raises(ArgumentError, match="relu"):
        neuron_type("relux")
    with pytest.raises(ArgumentError, match="takes 0"):
        neuron_type("tanh").fill((1.0,))
    assert neuron_type("hardtanh").fill((-2.0,)) == (-2.0, 1.0)


@every_case
def test_the_grid_finds_no_fault_with_the_table(name: str, args: tuple[float, ...]) -> None:
    kind = neuron_type(name)
    assert broken_claim(replace(kind, defaults=kind.fill(args))) == ""


@pytest.mark.parametrize(
    ("claims", "text"),
    [
        ({"lipschitz": lambda *_: 0.99}, "constant 0.99 does not hold between"),
        ({"lipschitz": lambda *_: math.nan}, "cannot be negative"),
        ({"jump": lambda *_: -1.0}, "cannot be negative"),
        ({"symmetry": lambda *_: Symmetry(homogeneous=True)}, "not homogeneous: phi\\(0.3 x\\)"),
        ({"symmetry": lambda *_: Symmetry(reflection=0.5)}, "no reflection"),
        ({"phi": torch.log}, "is not finite"),
        ({"phi": lambda x: x.cumsum(0)}, "not elementwise"),
        ({"phi": torch.rand_like}, "not elementwise, or not the same twice"),
        ({"phi": lambda x: x[1:]}, "one of the same shape"),
        ({"phi": lambda x: x.float()}, "one of the same shape"),
        ({"phi": lambda x: torch.tanh(x) + (x > 3)}, "does not hold between"),
    ],
)
def test_a_false_claim_is_refused_with_its_place(claims: dict[str, object], text: str) -> None:
    before = set(NEURON_TYPES)
    with pytest.raises(ArgumentError, match=text):
        register_neuron_type(replace(neuron_type("tanh"), name="mine", **claims))
    assert set(NEURON_TYPES) == before


@pytest.mark.usefixtures("registries")
def test_a_neuron_type_of_ones_own_is_listed_and_taken_once() -> None:
    mine = replace(neuron_type("tanh"), name="mine")
    register_neuron_type(mine)
    assert neuron_type("mine") is mine
    for name in ("mine", "relu", ""):
        with pytest.raises(ArgumentError, match=r"is there already; there are .*mine.*relu"):
            register_neuron_type(replace(mine, name=name))
    with pytest.raises(ArgumentError, match=r"there are .*mine"):
        neuron_type("yours")
