"""Data movement on ids against data movement on values."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from apoptosis.graph.capture import _module_stack, _Watch
from apoptosis.graph.rules.table import OPERATORS
from apoptosis.graph.trace.ids import ChannelIds, named_tensors
from apoptosis.graph.trace.result import TraceResult
from apoptosis.graph.trace.tracer import Tracer
from apoptosis.graph.trace.values import collapse, reshape


def _split(n: int) -> list[int]:
    return next(([d, n // d] for d in range(2, n) if n % d == 0), [n])


def _step(x: Tensor, kind: int, a: int, b: int) -> Tensor:
    """One movement that is valid for any shape."""
    dim = a % x.dim()
    steps = (
        lambda: x.transpose(dim, b % x.dim()),
        lambda: x.reshape(-1),
        lambda: x.reshape(*x.shape[:dim], *_split(x.shape[dim]), *x.shape[dim + 1 :]),
        lambda: x.flatten(min(dim, b % x.dim()), max(dim, b % x.dim())),
        lambda: x.roll(b, dim),
        lambda: x.flip(dim),
        lambda: torch.cat([x, x.flip(dim)], dim),
        lambda: torch.stack([x, x], dim),
        lambda: x.unsqueeze(dim).expand(*x.shape[:dim], 2, *x.shape[dim:]),
        lambda: x.narrow(dim, 0, max(1, x.shape[dim] - 1)),
        lambda: x.select(dim, b % x.shape[dim]) if x.dim() > 1 else x,
        lambda: x.index_select(dim, torch.arange(x.shape[dim]).flip(0)),
        lambda: x.chunk(2, dim)[-1],
        lambda: x.unbind(dim)[0] if x.dim() > 1 else x,
        lambda: x.repeat(2, *[1] * (x.dim() - 1)),
        lambda: x[..., ::2],
        lambda: x.clone(),
        lambda: x.movedim(dim, b % x.dim()).contiguous(),
        lambda: x[torch.arange(x.shape[0]) % 2 == 0],
        lambda: x.unfold(dim, min(2, x.shape[dim]), 1),
        lambda: x.rot90(b, (dim, (dim + 1) % x.dim())) if x.dim() > 1 else x,
        lambda: x.diagonal(0, dim, (dim + 1) % x.dim()) if x.dim() > 1 else x,
        lambda: x.reshape(-1).contiguous().as_strided((max(1, x.numel() // 2), 2), (1, 0)),
        lambda: x.repeat_interleave(2, dim),
        lambda: torch.complex(x, x).real if b % 2 else torch.view_as_real(torch.complex(x, x)),
        lambda: x.tile(2),
    )
    return steps[kind % len(steps)]()


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 25), st.integers(0, 5), st.integers(0, 5)), max_size=6))
def test_ids_go_where_the_values_go(steps: list[tuple[int, int, int]]) -> None:
    """Values and ids start equal (the channel's number); after any movements they are equal still."""
    layer = nn.Linear(3, 6)
    tensors, _, buffers = named_tensors(layer)
    trace = TraceResult(ChannelIds(tensors, buffers))
    tracer = Tracer(trace, layer, tensors, [], OPERATORS, "training")
    base = trace.channel_ids.tensors["weight"].bases[0]
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.copy_(torch.arange(base, base + 6.0))
        with _module_stack(tracer, layer), _Watch(tracer):
            x = layer(torch.ones(2, 4, 3))
            for kind, a, b in steps:
                if x.numel() > 2000 or x.dim() > 6:
                    break
                x = _step(x, kind, a, b)
    assert ["reads a constant" in reason.text for _, reason in trace.pins] == [True]  # the input alone
    ids = tracer.value(x).ids
    if ids.size == 1 and x.numel() > 1:
        assert torch.all(x == float(ids.flat[0]))
    else:
        np.testing.assert_array_equal(np.broadcast_to(ids, x.shape), x.numpy().astype(np.int64))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    st.randoms(use_true_random=False),
)
def test_reshape_of_collapsed_ids(shape: list[int], rng) -> None:
    varied = [rng.random() < 0.5 for _ in shape]
    small = [n if v else 1 for n, v in zip(shape, varied, strict=True)]
    ids = np.array([rng.randrange(100) for _ in range(int(np.prod(small)))], dtype=np.int64).reshape(small)
    factors = [f for n in shape for f in ([2, 2] if n == 4 and rng.random() < 0.5 else [n])]
    cut = rng.randrange(len(factors) + 1)
    new = [int(np.prod(factors[:cut])), *factors[cut:]]
    got = reshape(ids, shape, new)
    np.testing.assert_array_equal(np.broadcast_to(got, new), np.broadcast_to(ids, shape).reshape(new))
    assert collapse(got).shape == got.shape
