from __future__ import annotations

import json
import math
from collections import Counter, OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apoptosis.checkpoint.tree import pack, unpack
from apoptosis.errors import CheckpointError


def round_trip(value):
    tensors: dict[str, torch.Tensor] = {}
    return unpack(json.loads(json.dumps(pack(value, "x", tensors), allow_nan=False)), tensors)


leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
keys = st.text(max_size=3) | st.integers() | st.booleans() | st.none() | st.just("$") | st.tuples(st.integers())
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(keys, inner, max_size=3)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=12,
)


def typed(value):
    """The value with its types spelt out: True is not 1, a tuple is not a list."""
    if isinstance(value, dict):
        return ("dict", [(typed(k), typed(v)) for k, v in value.items()])
    if isinstance(value, list | tuple):
        return (type(value).__name__, [typed(v) for v in value])
    return (type(value).__name__, repr(value))


@settings(max_examples=150, deadline=None)
@given(trees)
def test_any_tree_comes_back_as_it_was(tree):
    assert typed(round_trip(tree)) == typed(tree)


def test_what_json_has_no_word_for():
    back = round_trip([math.nan, math.inf, -math.inf, -0.0, Counter({3: 2}), OrderedDict(b=1, a=2), torch.Size((2, 3))])
    assert math.isnan(back[0])
    assert back[1:3] == [math.inf, -math.inf]
    assert math.copysign(1, back[3]) == -1
    assert isinstance(back[4], Counter)
    assert sorted(back[4].elements()) == [3, 3]
    assert list(back[5]) == ["b", "a"]
    assert back[6] == (2, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.uint8, torch.float16])
def test_tensors_of_every_kind(dtype):
    tensor = torch.tensor([[0, 1], [3, 0]]).to(dtype)
    back = round_trip({"a.b": tensor, "a": {"b": tensor[0]}, "scalar": tensor[0, 1]})
    assert back["a.b"].dtype is dtype
    assert back["a.b"].equal(tensor)
    assert back["a"]["b"].equal(tensor[0])  # names that would collide stay apart
    assert back["scalar"].shape == ()


@pytest.mark.parametrize(
    "value", [b"bytes", {1, 2}, object(), torch.ones(3).to_sparse(), torch.ones(2, device="meta"), len]
)
def test_what_cannot_be_saved_is_named(value):
    with pytest.raises(CheckpointError, match=r"cannot save 'extra\.deep\.1'"):
        pack({"deep": [0, value]}, "extra", {})


@pytest.mark.parametrize(
    "skeleton",
    [
        {"$": "tensor", "name": "gone"},
        {"$": "module"},
        {"$": "tuple"},
        {"$": "float", "value": "x"},
        {"$": "dict", "items": 3},
    ],
)
def test_a_damaged_skeleton_is_an_error(skeleton):
    with pytest.raises(CheckpointError, match="damaged"):
        unpack([skeleton], {})
