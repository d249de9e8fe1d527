"""Neuron types of one's own: recognised, used for exact merges, compared with their formula, refused when wrong."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from apoptosis import register_activation, shrink_
from apoptosis.errors import ArgumentError
from apoptosis.graph import analyse
from apoptosis.numerics.activations import NEURON_TYPES
from apoptosis.records import Neuron

pytestmark = pytest.mark.usefixtures("registries")
X = torch.randn(64, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Snake(nn.Module):
    def __init__(self, frequency: float = 1.0) -> None:
        super().__init__()
        self.frequency = frequency

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.sin(self.frequency * x) ** 2 / self.frequency


class Slower(Snake):
    """A subclass, which may compute anything."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


class Cube(nn.Module):
    """Odd, and written in place."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp_(-1, 1).pow_(3)


class Ramp(nn.Module):
    """Positively homogeneous."""

    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * x.clamp(min=0) + 0.5 * x.clamp(max=0)


class Gate(nn.Module):
    """Point-symmetric: φ(-x) = 3 - φ(x)."""

    def forward(self, x: Tensor) -> Tensor:
        return 1.5 + torch.atan(x)


def snake(x: Tensor, frequency: float) -> Tensor:
    return x + torch.sin(frequency * x) ** 2 / frequency


def register_snake() -> None:
    register_activation("snake", snake, module_type=Snake, lipschitz=2.0, arguments={"frequency": 1.0})


def net(activation: nn.Module, width: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, width), activation, nn.Linear(width, 3)).double()


def neuron_of(model: nn.Module) -> Neuron | None:
    return analyse(model, (X,)).groups[0].neuron


def planted(activation: nn.Module, scale: float) -> nn.Sequential:
    """The second half of the neurons is the first half, times `scale`."""
    model = net(activation)
    with torch.no_grad():
        model[0].weight[4:] = scale * model[0].weight[:4]
        model[0].bias[4:] = scale * model[0].bias[:4]
    return model


def test_before_registering_there_is_no_neuron_and_no_pairwise_merge() -> None:
    assert neuron_of(net(Snake())) is None
    assert not shrink_(planted(Snake(), 1.0), X, [X], tolerance=0, criterion="pairwise")


def test_a_registered_module_is_a_neuron_with_its_arguments() -> None:
    register_snake()
    for frequency in (1.0, 3):
        neuron = neuron_of(net(Snake(frequency)))
        assert neuron is not None
        assert (neuron.activation, neuron.args) == ("snake", (float(frequency),))
    assert NEURON_TYPES["snake"].lipschitz(1.0) == 2.0


@pytest.mark.parametrize(
    ("module", "scale", "claims"),
    [
        (Snake, 1.0, {"lipschitz": 2.0}),
        (Cube, -1.0, {"lipschitz": 3.0, "reflection": 0.0}),
        (Ramp, 3.0, {"lipschitz": 2.0, "homogeneous": True}),
        (Gate, -1.0, {"lipschitz": lambda: 1.0, "reflection": 3.0}),
    ],
)
def test_what_the_symmetries_allow_is_merged_exactly_and_nothing_else(module, scale, claims) -> None:
    register_activation("mine", module(), module_type=module, **claims)
    model = planted(module(), scale)
    before = model(X)
    event = shrink_(model, X, [X], tolerance=0, criterion="pairwise")
    assert event.groups == {"0": (8, 4)}
    torch.testing.assert_close(model(X), before, rtol=1e-10, atol=1e-10)
    other = planted(module(), 0.5 if scale < 0 or module is Snake else -1.0)
    assert not shrink_(other, X, [X], tolerance=0, criterion="pairwise")


def test_lipschitz_bounds_what_an_inexact_merge_costs() -> None:
    register_snake()
    model = planted(Snake(), 1.0)
    with torch.no_grad():
        model[0].weight[4:] += 1e-3
    event = shrink_(model, X, [X], tolerance=0.02, criterion="pairwise")
    bounds = [c.value for c in event.certificates if c.kind == "worst_case"]
    assert event
    assert bounds
    assert max(bounds) > 0


def test_a_subclass_and_another_call_are_no_neuron() -> None:
    register_snake()
    assert neuron_of(net(Slower())) is None


def test_an_argument_that_is_no_plain_number_is_noted() -> None:
    register_snake()
    model = net(Snake(nn.Parameter(torch.tensor(1.0))))
    structure = analyse(model, (X,))
    assert structure.groups[0].neuron is None
    assert structure.groups[0].pin is None
    assert any("'frequency' is no plain number" in note for note in structure.notes)


def test_a_formula_that_is_not_the_modules_is_noted_and_nothing_is_merged() -> None:
    register_activation("wrong", torch.sin, module_type=Snake, lipschitz=1.0, reflection=0.0)
    structure = analyse(planted(Snake(), -1.0), (X,))
    assert structure.groups[0].neuron is None
    assert any("Snake is no neuron of type 'wrong' here: it puts out" in note for note in structure.notes)
    assert not shrink_(planted(Snake(), -1.0), X, [X], tolerance=0, criterion="pairwise")


def test_capture_leaves_no_trace_and_phi_may_be_a_module() -> None:
    register_activation("mine", Ramp(), module_type=Ramp, lipschitz=2.0, homogeneous=True)
    model = net(Ramp())
    state = torch.get_rng_state()
    structure = analyse(model, (X,))
    assert torch.equal(torch.get_rng_state(), state)
    assert structure.notes == ()
    assert {m.tensor for m in structure.groups[0].members} == {"0.weight", "0.bias"}


def test_two_in_a_row_are_no_neuron() -> None:
    register_snake()
    assert neuron_of(nn.Sequential(nn.Linear(5, 8), Snake(), Snake(), nn.Linear(8, 3)).double()) is None
    assert neuron_of(nn.Sequential(nn.Linear(5, 8), nn.Tanh(), Snake(), nn.Linear(8, 3)).double()) is None


def test_names_and_types_are_taken_once() -> None:
    register_snake()
    with pytest.raises(ArgumentError, match=r"'Snake' is a neuron type already; there are .*Tanhshrink"):
        register_activation("snake2", snake, module_type=Snake, lipschitz=2.0, arguments={"frequency": 1.0})
    with pytest.raises(ArgumentError, match=r"'snake' is there already; there are .*relu"):
        register_activation("snake", torch.sin, module_type=Gate, lipschitz=1.0)
    with pytest.raises(ArgumentError, match="'ReLU' is a neuron type already"):
        register_activation("ramp", torch.relu, module_type=nn.ReLU, lipschitz=1.0)
    with pytest.raises(ArgumentError, match=r"derived from torch.nn.Module"):
        register_activation("fn", torch.sin, module_type=torch.sin, lipschitz=1.0)
    register_activation("gate", Gate(), module_type=Gate, lipschitz=1.0)  # the refused ones left nothing behind


def test_parametrized_modules_are_a_type_of_their_own() -> None:
    class Half(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / 2

    register_snake()
    model = net(Snake())
    model[1].register_parameter("extra", nn.Parameter(torch.ones(())))
    parametrize.register_parametrization(model[1], "extra", Half())
    assert neuron_of(model) is None
