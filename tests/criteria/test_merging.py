"""Merges by symmetry: exact ones are found for every neuron type and leave the consumer's output as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apoptosis.criteria import GroupView, NeuronView, SiteView, choose, get_criterion
from apoptosis.criteria.merging import merge_order, weight_pairs
from apoptosis.errors import ArgumentError, NonFiniteError, ShapeError
from apoptosis.numerics.activations import NEURON_TYPES, neuron_type

PAIRWISE = get_criterion("pairwise")
seeds = st.integers(0, 2**32 - 1)


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(neuron: NeuronView, x: torch.Tensor) -> torch.Tensor:
    kind = neuron_type(neuron.activation)
    u = x @ neuron.incoming[:, :-1].T + neuron.incoming[:, -1]
    if neuron.slopes is not None:
        return torch.where(u > 0, u, neuron.slopes * u)
    return kind.phi(u, *kind.fill(neuron.args))


def view_of(neuron: NeuronView, seed: int, *, centred: bool = True) -> GroupView:
    num = neuron.incoming.shape[0]
    site = SiteView(key="s", weight=draw(seed + 9, 4, num, 1), centred=centred)
    return GroupView(name="g", num_channels=num, sites=(site,), neuron=neuron)


def change(view: GroupView, proposal, x: torch.Tensor) -> float:
    """Largest change of a consumer's output when the reduction stands in for the layer."""
    assert view.neuron is not None
    z, found = layer(view.neuron, x), proposal.reduction.sites["s"]
    standing = z[:, proposal.reduction.keep] @ found.mix + (0.0 if found.offset is None else found.offset)
    return float(((z - standing) @ view.sites[0].weight[:, :, 0].T).abs().max())


@pytest.mark.parametrize("name", NEURON_TYPES)
@given(seed=seeds, s=st.floats(0.05, 20))
@settings(max_examples=8, deadline=None)
def test_every_exact_merge_of_every_neuron_type_is_found_and_exact(name: str, seed: int, s: float) -> None:
    kind = neuron_type(name)
    symmetry = kind.symmetry(*kind.defaults)
    w = draw(seed, 5, 4)
    copies = [w[0]]
    if symmetry.homogeneous:
        copies.append(s * w[1])
    if symmetry.reflection is not None:
        copies.append(-w[2])
    dead = torch.zeros(1, 4, dtype=torch.float64)
    dead[0, -1] = 0.9
    neuron = NeuronView(incoming=torch.cat([w, torch.stack(copies), dead]), activation=name)
    view = view_of(neuron, seed)
    proposal = choose(PAIRWISE, view, 0.0)
    assert proposal is not None
    assert proposal.reduction.keep.numel() == 5
    x = draw(seed + 1, 50, 3) * 3
    assert change(view, proposal, x) < 1e-6 * max(1.0, s) * (1 + float(layer(neuron, x).abs().max()))
    assert proposal.reduction.merge is not None


def test_a_max_pooling_admits_no_sign_change_and_relu_none_either() -> None:
    w = torch.cat([draw(0, 3, 3), -draw(0, 3, 3)])
    for activation, max_pool, kept in (
        ("tanh", False, 3),
        ("tanh", True, 6),
        ("relu", False, 6),
        ("identity", False, 3),
    ):
        view = view_of(NeuronView(incoming=w, activation=activation, max_pool=max_pool), 0)
        proposal = choose(PAIRWISE, view, 0.0)
        assert (6 if proposal is None else proposal.reduction.keep.numel()) == kept


def test_constants_are_offered_only_where_an_offset_can_be_folded() -> None:
    w = draw(1, 4, 3)
    w[1, :-1], w[1, -1] = 0.0, 2.0  # constant 2 after ReLU
    w[2, :-1], w[2, -1] = 0.0, -2.0  # constant 0 after ReLU
    for centred, gone in ((True, {1, 2}), (False, {2})):
        proposal = choose(PAIRWISE, view_of(NeuronView(incoming=w, activation="relu"), 1, centred=centred), 0.0)
        assert proposal is not None
        assert {0, 1, 2, 3} - set(proposal.reduction.keep.tolist()) == gone
    sigmoids = NeuronView(incoming=torch.cat([w[:1], -w[:1]]), activation="sigmoid")
    assert choose(PAIRWISE, view_of(sigmoids, 1, centred=False), 0.0) is None
    assert choose(PAIRWISE, view_of(sigmoids, 1), 0.0) is not None


def test_prelu_merges_at_equal_slopes_only() -> None:
    w = draw(2, 1, 3).repeat(3, 1) * torch.tensor([[1.0], [2.0], [3.0]])
    neuron = NeuronView(incoming=w, activation="prelu", slopes=torch.tensor([0.1, 0.2, 0.1]))
    view = view_of(neuron, 2)
    proposal = choose(PAIRWISE, view, 0.0)
    assert proposal is not None
    assert proposal.reduction.keep.numel() == 2
    assert 1 in proposal.reduction.keep.tolist()
    assert change(view, proposal, draw(3, 30, 2)) < 1e-12


@pytest.mark.parametrize("name", ["relu", "tanh", "sigmoid", "gelu", "hardshrink", "elu", "identity"])
@given(seed=seeds)
@settings(max_examples=15, deadline=None)
def test_the_cost_bounds_every_pair_for_every_input(name: str, seed: int) -> None:
    neuron = NeuronView(incoming=draw(seed, 5, 4), activation=name)
    pairs = weight_pairs(neuron, offsets=True)
    x = draw(seed + 1, 40, 3) * 2
    z, length = layer(neuron, x).numpy(), np.sqrt(1 + x.square().sum(1).numpy())
    kind = neuron_type(name)
    jump = kind.jump(*kind.defaults)
    for j in range(5):
        for k in range(5):
            if j != k:
                error = np.abs(z[:, j] - pairs.scale[j, k] * z[:, k] - pairs.shift[j, k])
                assert (error <= (pairs.cost[j, k] - jump) * length + jump + 1e-9).all()
        error = np.abs(z[:, j] - pairs.constant[j])
        assert (error <= (pairs.constant_cost[j] - jump) * length + jump + 1e-9).all()


def test_without_a_neuron_nothing_merges() -> None:
    site = SiteView(key="s", weight=draw(0, 2, 3, 1))
    view = GroupView(name="g", num_channels=3, sites=(site,))
    assert PAIRWISE.rank(view).min_keep == 3


def test_a_normalisation_inside_leaves_momentum_to_be_sliced() -> None:
    neuron = NeuronView(incoming=draw(0, 1, 3).repeat(3, 1), activation="relu", normalised=True)
    proposal = choose(PAIRWISE, view_of(neuron, 0), 0.0)
    assert proposal is not None
    assert proposal.reduction.merge is None


def test_merge_order_takes_the_cheapest_first_and_keeps_one_of_each_family() -> None:
    cost = np.array([[np.inf, 0.0, 5.0], [0.0, np.inf, 5.0], [5.0, 5.0, np.inf]])
    order, stay = merge_order(cost, np.full(3, np.inf))
    assert stay == 1
    assert set(order[:2].tolist()) in ({0, 2}, {1, 2})
    order, stay = merge_order(np.full((3, 3), np.inf), np.array([np.inf, 0.0, np.inf]))
    assert (stay, order[-1]) == (2, 1)
    assert merge_order(np.full((1, 1), np.inf), np.array([0.0]))[0].tolist() == [0]


def test_bad_neurons_are_refused() -> None:
    with pytest.raises(ArgumentError, match="no neuron type"):
        weight_pairs(NeuronView(incoming=draw(0, 2, 2), activation="magic"), offsets=True)
    with pytest.raises(ShapeError, match="slopes"):
        weight_pairs(NeuronView(incoming=draw(0, 3, 2), activation="prelu", slopes=torch.ones(2)), offsets=True)
    with pytest.raises(NonFiniteError):
        weight_pairs(NeuronView(incoming=torch.full((2, 2), torch.nan), activation="relu"), offsets=True)
