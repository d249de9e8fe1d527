"""Large networks on one accelerator, with and without apoptosis, in turn, in one process.

    python -m benchmarks.gpu --json benchmarks/results/gpu.json    VGG-16, ResNet-50 at 224 pixels, GPT of 12 layers
    python -m benchmarks.gpu --device cpu --tiny                    small ones anywhere, to see that it works

bf16 autocast, channels last, widths in multiples of 64, fused AdamW. Data are made up: classes of smooth random
pictures with noise, and characters of a Markov chain. So losses only say that both runs learn; what counts are
milliseconds per step before and after, and what an event costs in dense steps.
Holds: these networks and the clock. Elsewhere: accuracy on real data (paper).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apoptosis import Apoptosis
from apoptosis.tools.recipes.networks import num_parameters
from benchmarks import shared
from benchmarks.paper.networks import GPT

TURN = 10  # steps that one run trains before it is the other's turn
Batch = tuple[Tensor, Tensor]


class Bottleneck(nn.Module):
    """He et al., arXiv 1512.03385: 1x1, 3x3, 1x1 with four times the width, and a shortcut."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        out = 4 * width
        self.body = nn.Sequential(
            nn.Conv2d(width_in, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out),
        )  # fmt: skip
        same = width_in == out and stride == 1
        narrow = nn.Sequential(nn.Conv2d(width_in, out, 1, stride=stride, bias=False), nn.BatchNorm2d(out))
        self.shortcut = nn.Identity() if same else narrow

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def resnet(depths: tuple[int, ...] = (3, 4, 6, 3), width: int = 64, classes: int = 10) -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(width)]
    layers += [nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1)]
    have = width
    for stage, depth in enumerate(depths):
        for block in range(depth):
            layers.append(Bottleneck(have, width << stage, 2 if stage and not block else 1))
            have = 4 * (width << stage)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(have, classes))


def vgg(width: int = 64, hidden: int = 4096, classes: int = 10) -> nn.Module:
    """Simonyan, Zisserman, arXiv 1409.1556, configuration D."""
    layers: list[nn.Module] = []
    have = 3
    for stage, depth in enumerate((2, 2, 3, 3, 3)):
        for _ in range(depth):
            out = min(width << stage, 8 * width)
            layers += [nn.Conv2d(have, out, 3, padding=1), nn.ReLU()]
            have = out
        layers.append(nn.MaxPool2d(2))
    head = [nn.AdaptiveAvgPool2d(7), nn.Flatten(), nn.Linear(49 * have, hidden), nn.ReLU(), nn.Dropout(0.5)]
    return nn.Sequential(*layers, *head, nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout(0.5),
                         nn.Linear(hidden, classes))  # fmt: skip


def pictures(size: int, batch: int, device: torch.device) -> Callable[[int], Batch]:
    base = torch.randn(10, 8, 3, size // 16, size // 16, generator=torch.Generator().manual_seed(0)).to(device)

    def draw(step: int) -> Batch:
        picks = torch.Generator(device).manual_seed(step)
        labels = torch.randint(0, 10, (batch,), generator=picks, device=device)
        mix = torch.randn(batch, 8, 1, 1, 1, generator=picks, device=device)
        x = F.interpolate((base[labels] * mix).sum(1), size=(size, size), mode="bilinear")
        x = x + 0.3 * torch.randn(x.shape, generator=picks, device=device)
        return x.contiguous(memory_format=torch.channels_last), labels

    return draw


def characters(length: int, batch: int, device: torch.device, vocabulary: int = 64) -> Callable[[int], Batch]:
    chain = torch.randn(vocabulary, vocabulary, generator=torch.Generator().manual_seed(0)).mul(2).softmax(1).to(device)

    def draw(step: int) -> Batch:
        picks = torch.Generator(device).manual_seed(step)
        text = [torch.randint(0, vocabulary, (batch,), generator=picks, device=device)]
        for _ in range(length):
            text.append(torch.multinomial(chain[text[-1]], 1, generator=picks)[:, 0])
        whole = torch.stack(text, 1)
        return whole[:, :-1], whole[:, 1:]

    return draw


def networks(device: torch.device, tiny: bool) -> dict[str, tuple[Callable[[], nn.Module], Callable[[int], Batch]]]:
    if tiny:
        images = pictures(32, 32, device)
        return {
            "vgg-16": (lambda: vgg(8, 64), images),
            "resnet-50": (lambda: resnet((1, 1, 1, 1), 8), images),
            "gpt": (lambda: GPT(64, 16, width=32, heads=2, depth=2, hidden=128), characters(16, 16, device)),
        }
    return {
        "vgg-16": (vgg, pictures(224, 64, device)),
        "resnet-50": (resnet, pictures(224, 128, device)),
        "gpt": (lambda: GPT(64, 256, width=768, heads=12, depth=12, hidden=3072), characters(256, 32, device)),
    }


class PairedRun:
    """One of two networks that see the same batches; its clock waits for the device."""

    def __init__(self, build: Callable[[], nn.Module], device: torch.device) -> None:
        torch.manual_seed(0)
        self.model = build().to(device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-4, fused=True)
        self.device, self.seconds, self.loss = device, 0.0, float("nan")
        self.apo: Apoptosis | None = None
        self.events: list[dict[str, Any]] = []
        self.turns: list[tuple[int, float]] = []  # steps, seconds

    def train(self, draw: Callable[[int], Batch], first: int, steps: int) -> None:
        batches = [draw(step) for step in range(first, first + steps)]
        wait(self.device)
        start = time.perf_counter()
        for inputs, labels in batches:
            with torch.autocast(self.device.type, dtype=torch.bfloat16):
                out = self.model(inputs)
            loss = F.cross_entropy(out.float().flatten(0, -2), labels.flatten())
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            if self.apo is not None and (event := self.apo.step()):
                self.events.append({"step": event.step, "seconds": event.seconds, "macs": event.macs[1]})
        wait(self.device)
        self.turns.append((steps, time.perf_counter() - start))
        self.seconds += self.turns[-1][1]
        self.loss = float(loss.detach())

    def step_seconds(self, last: int) -> float:
        steps, seconds = map(sum, zip(*self.turns[-last:], strict=True))
        return seconds / steps


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def run(name: str, device: torch.device, steps: int, tiny: bool) -> dict[str, Any]:
    build, draw = networks(device, tiny)[name]
    dense, shrunk = PairedRun(build, device), PairedRun(build, device)
    full = num_parameters(dense.model)
    start = time.perf_counter()
    align = 8 if tiny else 64
    apo = Apoptosis(shrunk.model, shrunk.optimizer, draw(0)[0][:2], total_steps=steps, align=align)
    shrunk.apo, shrunk.seconds = apo, time.perf_counter() - start
    macs = apo.structure.macs
    for one, first, number in shared.in_turn((shrunk, dense), steps, TURN):
        one.train(draw, first, number)
    dense_step, step = dense.step_seconds(5), shrunk.step_seconds(5)
    found = {
        "network": name,
        "steps": steps,
        "seconds": [dense.seconds, shrunk.seconds],
        "step_seconds": [dense_step, step],
        "losses": [dense.loss, shrunk.loss],
        "parameters": [full, num_parameters(shrunk.model)],
        "macs": [macs, apo.structure.macs],
        "own_seconds": apo.seconds,
        "events": [event | {"dense_steps": event["seconds"] / dense_step} for event in shrunk.events],
    }
    print(
        f"{name}: {dense.seconds / shrunk.seconds:.2f}x faster in all, {dense_step / step:.2f}x per step at the end, "
        f"{full / found['parameters'][1]:.1f}x fewer parameters, {macs / apo.structure.macs:.1f}x fewer multiply-adds, "
        f"loss {dense.loss:.3f} without, {shrunk.loss:.3f} with",
        flush=True,
    )
    return found


def main() -> int:
    parser = shared.parser(__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", default="vgg-16,resnet-50,gpt")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--tiny", action="store_true", help="small networks, to see that it works")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.device.startswith("cuda") and not torch.cuda.is_available():
        print("benchmarks.gpu: error: no CUDA device; --device cpu --tiny shows that it works.", file=sys.stderr)
        return 1
    device = torch.device(given.device)
    runs = [run(name, device, given.steps, given.tiny) for name in given.only.split(",")]
    if given.json is not None:
        shared.write(given.json, shared.result("gpu", device, seed=0, tiny=given.tiny, runs=runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
