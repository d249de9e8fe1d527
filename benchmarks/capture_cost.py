"""Measure what it takes to find the structure of large networks: seconds, and memory beyond their weights.

    python -m benchmarks.capture_cost                     all networks, each in a process of its own
    python -m benchmarks.capture_cost --only ResNet-101

Holds: the networks and this measurement. Elsewhere: tables (table.py).
The Llama configuration has 1.1 billion parameters, of which none is made: it is built as fake tensors, on which the
forward pass runs without numbers. It needs the package transformers.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from apoptosis.engine.event_builder import num_parameters
from apoptosis.graph import analyse
from benchmarks import shared

REPEATS = 3
Example = tuple[tuple[Any, ...], dict[str, Any]]


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 with a skip, as in ResNet-101."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.body = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.skip: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.skip = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.skip(x))


def resnet101() -> tuple[nn.Module, Example]:
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    ]
    inputs = 64
    for width, depth, stride in ((64, 3, 1), (128, 4, 2), (256, 23, 2), (512, 3, 2)):
        for i in range(depth):
            layers.append(Bottleneck(inputs, width, stride if i == 0 else 1))
            inputs = 4 * width
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000))
    return net, ((torch.randn(2, 3, 64, 64),), {})


def mlp100() -> tuple[nn.Module, Example]:
    layers = [layer for _ in range(99) for layer in (nn.Linear(1024, 1024), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(1024, 10)), ((torch.randn(2, 1024),), {})


def transformer(blocks: int) -> tuple[nn.Module, Example]:
    """Blocks of attention and feed-forward: four weights in each."""
    layer = nn.TransformerEncoderLayer(256, 8, 1024, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, blocks, enable_nested_tensor=False), ((torch.randn(2, 16, 256),), {})


def llama() -> tuple[nn.Module, Example]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
        num_key_value_heads=4, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config), ((), {"input_ids": torch.zeros(2, 64, dtype=torch.int64)})


# name -> (factory, built as fake tensors, limit in seconds, limit in bytes beyond the weights)
NETWORKS: dict[str, tuple[Callable[[], tuple[nn.Module, Example]], bool, float | None, float | None]] = {
    "MLP, 100 layers": (mlp100, False, 5.0, None),
    "ResNet-101": (resnet101, False, 5.0, None),
    "transformer, 25 blocks": (partial(transformer, 25), False, 5.0, None),
    "transformer, 100 blocks": (partial(transformer, 100), False, None, None),
    "Llama, 1.1 billion": (llama, True, 60.0, 2.0 * 2**30),
}


def measure(name: str) -> dict[str, Any]:
    """Capture one network; the first capture of the process and the best of the next ones."""
    make, fake, limit, limit_bytes = NETWORKS[name]
    warm = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    analyse(warm, (torch.zeros(2, 4),))  # libraries that torch loads late are no part of it
    torch.set_num_threads(1)  # the passes are small, and what is measured is the bookkeeping
    torch.manual_seed(0)
    with FakeTensorMode() if fake else nullcontext():
        model, (args, kwargs) = make()
        before = resident("VmRSS")
        with suppress(OSError):  # the peak so far is forgotten
            Path("/proc/self/clear_refs").write_text("5")
        seconds, own = [], []
        for _ in range(REPEATS):
            start, own_start = time.perf_counter(), time.process_time()
            structure = analyse(model, args, kwargs)
            seconds.append(time.perf_counter() - start)
            own.append(time.process_time() - own_start)
    free = [group for group in structure.groups if group.pin is None]
    return {
        "network": name,
        "fake": fake,
        "parameters": num_parameters(model),
        "weights": sum(parameter.dim() > 1 for parameter in model.parameters()),
        "groups": len(structure.groups),
        "groups_free": len(free),
        "seconds_first": seconds[0],
        "seconds_next": min(seconds[1:]),
        "processor_seconds_first": own[0],
        "processor_seconds_next": min(own[1:]),
        "bytes_beyond_weights": resident("VmHWM") - before,
        "limit_seconds": limit,
        "limit_bytes": limit_bytes,
    }


def resident(field: str) -> int:
    """Bytes of this process in memory: now (VmRSS) or at most so far (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: this benchmark needs Linux")


def main() -> int:
    parser = shared.parser(__doc__)
    parser.add_argument("--only", default=";".join(NETWORKS), help=f"of: {'; '.join(NETWORKS)}")
    parser.add_argument("--json", type=Path, default=shared.RESULTS / "capture-cost.json")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(given.one)))
        return 0
    runs = []
    for name in given.only.split(";"):
        runs.append(shared.in_own_process("benchmarks.capture_cost", "--one", name))
        run = runs[-1]
        print(f"{name}: {run['seconds_first']:.2f} s, again {run['seconds_next']:.2f} s, "
              f"{run['bytes_beyond_weights'] / 2**20:.0f} MiB beyond the weights", flush=True)  # fmt: skip
    shared.write(given.json, shared.result("capture", runs=runs))
    over = [r["network"] for r in runs if (r["limit_seconds"] is not None and r["seconds_first"] > r["limit_seconds"])
            or (r["limit_bytes"] is not None and r["bytes_beyond_weights"] > r["limit_bytes"])]  # fmt: skip
    if over:
        print(f"beyond their limit: {', '.join(over)}", file=sys.stderr)
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
