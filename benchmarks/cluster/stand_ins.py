"""Networks with the plans of VGG-16 and ResNet-50, small enough for one core: how much apoptosis leaves of them.

    python -m benchmarks.cluster.stand_ins --data-dir DIR     benchmarks/results/scaling-vgg.json, scaling-residual.json

Holds: two tasks on CIFAR-10 besides those of the comparison, trained dense and with apoptosis by its recipe.
Elsewhere: the recipe (benchmarks/paper), what follows for larger networks (model.py).
References: Simonyan, Zisserman, arXiv 1409.1556; He, Zhang, Ren, Sun, arXiv 1512.03385.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import shared
from benchmarks.paper.cells import header, train
from benchmarks.paper.methods import Shrinking
from benchmarks.paper.networks import vgg11
from benchmarks.paper.tasks import TASKS, Task
from benchmarks.paper.training import MethodRun


def _conv(num_in: int, num_out: int, size: int, stride: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(num_in, num_out, size, stride, padding=size // 2, bias=False)
    return [conv, nn.BatchNorm2d(num_out)]


class Bottleneck(nn.Module):
    """ResNet-50's block: 1x1, 3x3 and 1x1 convolutions and a shortcut, four times as wide outside as inside."""

    def __init__(self, num_in: int, inner: int, stride: int) -> None:
        super().__init__()
        outer = 4 * inner
        self.body = nn.Sequential(
            *_conv(num_in, inner, 1), nn.ReLU(), *_conv(inner, inner, 3, stride), nn.ReLU(), *_conv(inner, outer, 1)
        )
        same = num_in == outer and stride == 1
        self.shortcut = nn.Identity() if same else nn.Sequential(*_conv(num_in, outer, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def residual() -> nn.Sequential:
    """ResNet-50's plan at half its widths and two blocks per stage, its stem for 32 pixels."""
    layers: list[nn.Module] = [*_conv(3, 32, 3), nn.ReLU(), nn.MaxPool2d(2)]
    planes = 32
    for stage in range(4):
        for block in range(2):
            inner = 32 << stage
            layers.append(Bottleneck(planes, inner, 2 if stage and not block else 1))
            planes = 4 * inner
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(planes, 10))


def _task(name: str, network: str, epochs: int, build: Callable[[], nn.Module]) -> Task:
    return Task(name=name, network=network, metric="accuracy", unit=100, epochs=epochs, seeds=1,
                  load=TASKS["cifar10"].load, build=lambda data, scale: build())  # fmt: skip


STAND_INS = {
    "vgg": _task("vgg", "VGG-11 of half width, for 32 px", 4, vgg11),
    "residual": _task("residual", "ResNet-26 of half width, for 32 px", 2, residual),
}


def run_stand_in(name: str, data_dir: Path | None, rows: int | None, seed: int) -> dict[str, object]:
    """Train a stand-in dense and with apoptosis, epoch by epoch in turn, on one thread; return its record."""
    torch.set_num_threads(1)
    task = STAND_INS[name]
    data = task.load(data_dir, rows)
    both: list[MethodRun] = [MethodRun("dense", task, data, seed), Shrinking("apoptosis", task, data, seed)]
    begin = time.monotonic()
    train(both, lambda line: print(f"{time.monotonic() - begin:6.0f} s  {line}", flush=True))
    return header("scaling-stand-in", task, data, seed) | {"methods": {one.name: one.record() for one in both}}


def main() -> int:
    parser = shared.parser(__doc__)
    parser.add_argument("--data-dir", type=Path, help="where CIFAR-10 lies; it is fetched without")
    parser.add_argument("--only", choices=STAND_INS, help="one of both")
    parser.add_argument("--rows", type=int, help="of the training images; all without")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=shared.RESULTS)
    given = parser.parse_args()
    for name in [given.only] if given.only else STAND_INS:
        shared.write(given.out / f"scaling-{name}.json", run_stand_in(name, given.data_dir, given.rows, given.seed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
