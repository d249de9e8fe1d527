"""Random networks under both oracles: a few hundred here, thousands with `make networks` (python -m families.long)."""

import re

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from families.generator import INPUTS, Network, generate, numbers, reduce
from families.long import kind_of, message, run
from families.regressions import OPEN
from families.trial import InvalidNetworkError, check

NETWORKS, MOST = 200, 3  # blocks in a row: fewer than in a long run, for the time it takes


@pytest.mark.parametrize("kind", INPUTS)
def test_networks(kind: str) -> None:
    failed: list[tuple[list[int], str]] = []

    @settings(
        max_examples=NETWORKS // len(INPUTS),
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],  # failures are cut down below, with a limit on the time that takes
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(st.integers(0, 59), min_size=20, max_size=90))
    def holds(choices: list[int]) -> None:
        text = message(generate(choices, kind, most=MOST), len(choices), check)
        if text and not any(re.search(pattern, text) for pattern in OPEN):
            failed.append((choices, text))

    holds()
    if failed:
        choices, text = failed[0]
        wanted, seed = kind_of(text), len(choices)
        small = reduce(
            choices, lambda c: kind_of(message(generate(c, kind, most=MOST), seed, check)) == wanted, budget=60
        )
        pytest.fail(
            f"{len(failed)} fail; first: {text}\ncheck(network, {seed})\n{generate(small, kind, most=MOST).source}"
        )


def test_a_list_of_numbers_is_one_network() -> None:
    for seed in range(20):
        first, second = generate(numbers(seed)), generate(numbers(seed))
        assert first == second
        model, same = first.build(), second.build()
        x = first.example(5)
        torch.manual_seed(0)
        out = model.eval()(x)
        assert torch.equal(
            *((net.eval()(x),)[0] if isinstance(out, torch.Tensor) else net.eval()(x)[0] for net in (model, same))
        )


def test_the_blocks_are_all_met() -> None:
    from families import blocks

    met = {feature for seed in range(400) for feature in generate(numbers(seed)).features}
    known = {b.__name__ for table in (blocks.FREE, blocks.SIZED, blocks.SIMPLE) for row in table.values() for b in row}
    assert met == known | {"to_vector", "to_sequence"}


def test_no_numbers_are_the_simplest_network() -> None:
    assert generate([]).source.count("nn.Linear") == 3
    assert generate([], "image").source.count("nn.Conv2d") == 2


def test_reduce_finds_a_smaller_list_that_fails_alike() -> None:
    start = next(n for seed in range(99) if "GroupNorm" in generate(n := numbers(seed), "image").source)
    tries = []

    def fails(choices: list[int]) -> bool:
        tries.append(choices)
        return "GroupNorm" in generate(choices, "image").source

    small = reduce(start, fails, budget=300)
    assert fails(small)
    assert len(small) < len(start) / 2
    assert len(tries) <= 302


BAD = """import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, h):
        h = torch.tanh(self.a(h))
        return self.b(h * {factor})
"""


def test_the_oracle_sees_a_network_that_computes_with_its_width() -> None:
    given_ = INPUTS["vector"]
    check(Network(BAD.format(factor="0.5"), given_, False, ()))
    with pytest.raises(AssertionError, match="computes with sizes"):
        check(Network(BAD.format(factor="h.shape[1]"), given_, False, ()))
    check(Network(BAD.format(factor="h.shape[1]"), given_, True, ()))
    with pytest.raises(InvalidNetworkError):
        check(Network(BAD.format(factor="0.0"), given_, False, ()))


def test_the_command_tells_what_failed(capsys: pytest.CaptureFixture[str]) -> None:
    def breaks(network: Network, seed: int) -> None:
        assert "Conv2d" not in network.source, "no convolution, please"

    assert run(range(40, 70), breaks, budget=60) == 1
    told = capsys.readouterr().out
    assert "no convolution, please" in told
    assert told.count("class Net") == 1
    assert run(range(3), lambda network, seed: None) == 0
