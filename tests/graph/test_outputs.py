"""Whatever a model returns, the tensors in it are its outputs."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from apoptosis.errors import CaptureError
from apoptosis.graph import analyse
from apoptosis.graph.trace.outputs import named_in, tensors_in

X = torch.randn(3, 8)
Pair = namedtuple("Pair", "logits state")


@dataclass
class Record:
    logits: Any
    state: Any = None


class Plain:
    def __init__(self, logits: Any, state: Any) -> None:
        self.logits, self.state = logits, state


class Slotted:
    __slots__ = ("logits", "state")

    def __init__(self, logits: Any, state: Any) -> None:
        self.logits, self.state = logits, state


class Net(nn.Module):
    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(8, 6), nn.Linear(6, 5), nn.Linear(5, 2)
        self.wrap = wrap

    def forward(self, x):
        h = torch.relu(self.first(x))
        z = self.middle(h)
        return self.wrap(self.last(torch.relu(z)), z)


WRAPS = {
    "tuple": (lambda y, z: (y, z), "[1]"),
    "list in a dict": (lambda y, z: {"logits": y, "states": [z]}, "states[0]"),
    "ordered": (lambda y, z: OrderedDict(logits=y, state=z), "state"),
    "named tuple": (Pair, "[1]"),
    "dataclass": (Record, "state"),
    "object": (Plain, "state"),
    "slots": (Slotted, "state"),
    "nested": (lambda y, z: (y, {"a": Record(None, Plain(z, None))}), "[1].a.state.logits"),
    "itself": (lambda y, z: z, ""),
}


@pytest.mark.parametrize(("wrap", "way"), WRAPS.values(), ids=WRAPS)
def test_what_is_returned_is_pinned_and_named(wrap, way) -> None:
    structure = analyse(Net(wrap), (X,))
    pins = {g.name: g.pin for g in structure.groups}
    assert pins["first"] is None
    assert pins["middle"] is not None
    assert pins["middle"].reason == "they are the network's output" + (f" '{way}'" if way else "")
    assert "need not return" in pins["middle"].remedy


def test_model_output_of_transformers() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")
    net = Net(lambda y, z: outputs.BaseModelOutputWithPooling(last_hidden_state=y, hidden_states=(z,)))
    pins = {g.name: g.pin for g in analyse(net, (X,)).groups}
    assert pins["middle"] is not None
    assert "'hidden_states[0]'" in pins["middle"].reason


def test_what_is_still_to_run_is_refused() -> None:
    class Yields(Net):
        def forward(self, x):
            yield self.first(x)

    with pytest.raises(CaptureError, match=r"returns a generator, which runs only when it is read.*list or a tuple"):
        analyse(Yields(None), (X,))
    lazily = Net(lambda y, z: {"logits": y, "rest": (t for t in (z,))})
    with pytest.raises(CaptureError, match=r"returns a generator at 'rest'"):
        analyse(lazily, (X,))

    class Waits(Net):
        async def forward(self, x):
            return self.first(x)

    with pytest.warns(RuntimeWarning, match="never awaited"), pytest.raises(CaptureError, match="coroutine"):
        analyse(Waits(None), (X,))


@pytest.mark.parametrize("wrap", [lambda y, z: None, lambda y, z: float(y.detach().sum()), lambda y, z: {}])
def test_no_tensor_at_all(wrap) -> None:
    with pytest.raises(CaptureError, match=r"Net returns no tensor on example_input.*loss is computed"):
        analyse(Net(wrap), (X,))


def test_a_container_that_holds_itself() -> None:
    held: list[Any] = [X]
    held.append(held)
    assert [way for way, _ in named_in(held)] == ["[0]"]
    assert len(list(tensors_in({"a": X, "b": (X, None, 3, "x")}))) == 2
