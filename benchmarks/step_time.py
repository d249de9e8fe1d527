"""Hold what a training step is predicted to take at other widths against what it takes.

    python -m benchmarks.step_time --json benchmarks/results/step-time.json
    python -m benchmarks.step_time --only gpt --samples 3          a part, printed alone

Of every network some copies lose random shares of the channels of all groups, by the surgery that events use. The
table of timings is measured once, on the full network; every copy then trains in turn with the full one, step by step,
on random numbers. Times are processor seconds of one thread, medians; the figure is how many times faster the copy's
step is.
Holds: the networks and the comparison. Elsewhere: the table of timings (apoptosis.decide.timing), the page (table.py).
"""

from __future__ import annotations

import copy
import json
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apoptosis.decide.acceptance import AcceptanceResult
from apoptosis.decide.timing import measure_timings
from apoptosis.engine.applying import apply_reductions
from apoptosis.graph import analyse
from apoptosis.planner import Costs
from apoptosis.records import Group, Reduction, SiteReduction, Structure
from apoptosis.surgery.target import Target
from benchmarks import shared
from benchmarks.small_transformers import GPT

SEED, SAMPLES, STEPS, WARM = 0, 5, 7, 2
LEAST = 0.2  # of the channels of a group that a copy keeps
CHARACTERS, CLASSES = 65, 10
Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Setting:
    """A network, a batch, a loss and an optimizer. rows: of the batch."""

    model: nn.Module
    call: Call
    loss: Callable[[Any], Tensor]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), 1e-4)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)


def _classes(rows: int) -> Callable[[Tensor], Tensor]:
    labels = torch.randint(0, CLASSES, (rows,))
    return lambda out: nn.functional.cross_entropy(out, labels)


def mlp() -> Setting:
    net = nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, CLASSES))
    return Setting(net, ((torch.randn(128, 784),), {}), _classes(128), adam)


def vgg() -> Setting:
    layers: list[nn.Module] = []
    width = 3
    for size in (32, 0, 64, 0, 128, 128, 0, 256, 256, 0, 256, 256, 0):
        if size:
            layers += [nn.Conv2d(width, size, 3, padding=1, bias=False), nn.BatchNorm2d(size), nn.ReLU()]
            width = size
        else:
            layers.append(nn.MaxPool2d(2))
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(width, CLASSES))
    return Setting(net, ((torch.randn(32, 3, 32, 32),), {}), _classes(32), sgd)


def gpt() -> Setting:
    ids, after = torch.randint(0, CHARACTERS, (2, 16, 64))
    return Setting(
        GPT(CHARACTERS), ((ids,), {}), lambda out: nn.functional.cross_entropy(out.flatten(0, 1), after.flatten()), adam
    )


def minilm() -> Setting:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, vocab_size=3000
    )
    config.num_labels = CLASSES
    ids = torch.randint(0, 3000, (16, 32))
    call: Call = ((), {"input_ids": ids, "attention_mask": torch.ones_like(ids), "return_dict": True})
    labels = _classes(16)
    return Setting(BertForSequenceClassification(config), call, lambda out: labels(out.logits), adam)


NETWORKS: Mapping[str, tuple[str, Callable[[], Setting]]] = {
    "mlp": ("multilayer perceptron 784-1024-1024-10, batch 128, Adam", mlp),
    "vgg": ("VGG-11 of half width, 32 images, SGD", vgg),
    "gpt": ("GPT, 4 blocks of 128, 16 x 64 characters, Adam", gpt),
    "minilm": ("BERT of MiniLM's shape, 16 x 32 tokens, Adam", minilm),
}


def random_widths(structure: Structure, draws: random.Random) -> dict[str, int]:
    """Return widths of all open groups, multiples of eight: of two that conflict the first drawn shrinks."""
    keeps: dict[str, int] = {}
    taken: set[str] = set()
    for group in structure.open_groups:
        if group.name in taken or group.name.endswith(":heads"):
            continue
        taken.update(group.conflicts_with)
        row = group.num_channels // group.rows
        own = round(draws.uniform(LEAST, 1.0) * row)
        keeps[group.name] = group.rows * max(1, own if row < 64 else 8 * round(own / 8))
    return keeps


def reduction_of(group: Group, keep: int) -> Reduction:
    """Keep the first channels of every row; the others go unmixed."""
    row = group.num_channels // group.rows
    kept = torch.arange(group.num_channels).reshape(group.rows, row)[:, : keep // group.rows].reshape(-1)
    mix = torch.zeros(keep, group.num_channels, dtype=torch.float64)
    mix[torch.arange(keep), kept] = 1.0
    return Reduction(
        group=group.name, keep=kept, sites={s.key: SiteReduction(mix=mix, offset=None) for s in group.sites}
    )


class Trained:
    """A network and what trains it."""

    def __init__(self, setting: Setting, model: nn.Module) -> None:
        self.setting, self.model, self.optimizer = setting, model.train(), setting.optimizer(model)

    def step(self) -> float:
        args, kwargs = self.setting.call
        start = time.thread_time()
        self.optimizer.zero_grad()
        self.setting.loss(self.model(*args, **kwargs)).backward()
        self.optimizer.step()
        return time.thread_time() - start


def sample(setting: Setting, structure: Structure, costs: Costs, draws: random.Random) -> dict[str, Any]:
    """Train a narrower copy in turn with the full network; tell what was predicted and what was measured."""
    keeps = random_widths(structure, draws)
    model = copy.deepcopy(setting.model)
    target = Target(model=model, optimizers=(), call=setting.call)
    reductions = [reduction_of(g, keeps[g.name]) for g in structure.open_groups if keeps.get(g.name, 0) < g.num_channels
                  and g.name in keeps]  # fmt: skip
    done = apply_reductions(target, structure, reductions, {}, None, lambda change: AcceptanceResult(change=change))
    if not done.committed:
        raise SystemExit(f"a copy could not be made: {done.refused}")
    widths = {g.name: g.num_channels for g in done.structure.groups if g.name in keeps}
    before, after = costs.of({}), costs.of(widths)
    full, narrow = Trained(setting, copy.deepcopy(setting.model)), Trained(setting, model)
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(WARM + STEPS):
        for own, trained in zip(times, (full, narrow), strict=True):
            seconds = trained.step()
            if number >= WARM:
                own.append(seconds)
    whole, part = (statistics.median(own) for own in times)
    return {
        "widths": widths,
        "seconds": [whole, part],
        "predicted_seconds": [before.seconds, after.seconds],
        "measured": whole / part,
        "predicted": before.seconds / after.seconds,
        "by_macs": before.macs / after.macs,
    }


def network(name: str, samples: int) -> dict[str, Any]:
    torch.manual_seed(SEED)
    setting = NETWORKS[name][1]()
    args, kwargs = setting.call
    structure, draws = analyse(setting.model, args, kwargs), random.Random(SEED)
    start, cpu = time.perf_counter(), time.thread_time()
    timings = measure_timings(setting.model, setting.call, structure, [setting.optimizer(setting.model)])
    took = {"measuring_seconds": time.perf_counter() - start, "measuring_processor_seconds": time.thread_time() - cpu}
    costs = Costs(structure, timings)
    runs = [sample(setting, structure, costs, draws) for _ in range(samples)]
    found = {"network": name, "words": NETWORKS[name][0], **took, "timings": timings.as_dict(), "samples": runs}
    for key in ("predicted", "by_macs"):
        errors = [abs(run[key] / run["measured"] - 1.0) for run in runs]
        found[f"{key}_error"] = {"median": statistics.median(errors), "worst": max(errors)}
    return found


def main() -> None:
    parser = shared.parser(__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", choices=sorted(NETWORKS))
    parser.add_argument("--samples", type=int, default=SAMPLES)
    given = parser.parse_args()
    torch.set_num_threads(1)
    runs = []
    for name in [given.only] if given.only else list(NETWORKS):
        runs.append(network(name, given.samples))
        shown = {key: value for key, value in runs[-1].items() if key not in ("timings", "samples")}
        for run in runs[-1]["samples"]:
            print(" ".join(f"{key} {run[key]:.2f}" for key in ("measured", "predicted", "by_macs")), flush=True)
        print(json.dumps(shown), flush=True)
    if given.json is not None:
        shared.write(given.json, shared.result("step-time", seed=SEED, runs=runs))


if __name__ == "__main__":
    main()
