"""Small transformers trained with and without apoptosis at its default settings, step by step in turn, in one process.

    python -m benchmarks.small_transformers --data-dir DIR --json benchmarks/results/transformers.json
    python -m benchmarks.small_transformers --data-dir DIR --only gpt --seeds 0 --steps 600     a part, printed alone
    python -m benchmarks.small_transformers --data-dir DIR --only gpt --needs 15,30,60,100,150,200,300 --steps 600

DIR holds tinyshakespeare/input.txt and cifar-10-batches-bin/. Figures are of validation splits alone: of Shakespeare
the first 90 % train, the next 5 % validate, the rest is never read; of CIFAR-10 the last 5,000 training images
validate.
Holds: these networks, their tasks and the comparison. Elsewhere: what docs/research.md makes of it.
"""

from __future__ import annotations

import json
import math
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apoptosis import Apoptosis
from apoptosis.criteria import get_criterion
from apoptosis.graph import analyse, replay
from apoptosis.observe import Observer
from apoptosis.planner import Request, make_plan
from benchmarks import shared

WIDTH, LAYERS, HEADS, CONTEXT, BATCH = 128, 4, 4, 64, 32
PEAK, FIRST, FLOOR = 2e-3, 50, 0.1  # learning rate: peak, steps to it, share of it at the end of the cosine
TURN = 25  # steps that one run trains before it is the other's turn
Batch = tuple[Tensor, Tensor]


class Block(nn.Module):
    """Attention and a feed-forward layer before the norm, as GPT-2 and ViT have them."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.norm1(x)).chunk(3, -1)
        q, k, v = (t.unflatten(2, (HEADS, -1)).transpose(1, 2) for t in parts)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class GPT(nn.Module):
    """Characters to the logits of the next one, learnt positions."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(characters, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block(causal=True) for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, characters, bias=False)
        initialise(self)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.place(torch.arange(ids.shape[1], device=ids.device))
        return self.head(self.norm(self.blocks(x)))


class Encoder(nn.Module):
    """PyTorch's own encoder: characters, some of them hidden, to the logits of what stands there."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(characters + 1, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 4 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, LAYERS, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, characters)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.place(torch.arange(ids.shape[1], device=ids.device))
        return self.head(self.encoder(x))


class ViT(nn.Module):
    """Images of 32 x 32 as 64 patches of 4 x 4, to the logits of ten classes, by the mean over patches."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Conv2d(3, WIDTH, 4, 4), nn.Parameter(torch.zeros(64, WIDTH))
        self.blocks = nn.Sequential(*(Block(causal=False) for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images).flatten(2).transpose(1, 2) + self.place
        return self.head(self.norm(self.blocks(x)).mean(1))


def initialise(model: nn.Module) -> None:
    """Set weights as GPT-2 does: normal, narrower where they write to the residual stream."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            out = name.endswith(("proj", "fc2"))
            nn.init.normal_(module.weight, std=0.02 / (2 * LAYERS) ** 0.5 if out else 0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)


def llama(characters: int) -> nn.Module:
    """Return a Llama of `transformers`: rotary positions, gated feed-forward, two heads of queries per one of keys."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=characters,
        hidden_size=WIDTH,
        intermediate_size=352,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def gpt2(characters: int) -> nn.Module:
    """Return a GPT-2 of `transformers`, with its dropout of 0.1 and tied embeddings."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=characters, n_positions=CONTEXT, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, use_cache=False
    )
    return GPT2LMHeadModel(config)


@dataclass(frozen=True)
class Task:
    """train, validation: draw a batch (inputs, targets) by a generator; build: the network."""

    build: Callable[[], nn.Module]
    train: Callable[[torch.Generator], Batch]
    validation: Callable[[torch.Generator], Batch]


def characters_of(folder: Path) -> tuple[int, Tensor, Tensor]:
    text = (folder / "tinyshakespeare" / "input.txt").read_text()
    text = text[: int(0.95 * len(text))]
    names = sorted(set(text))
    ids = torch.tensor([names.index(c) for c in text])
    first = round(len(ids) * 0.9 / 0.95)
    return len(names), ids[:first], ids[first:]


def next_character(ids: Tensor) -> Callable[[torch.Generator], Batch]:
    def draw(picks: torch.Generator) -> Batch:
        at = torch.randint(0, len(ids) - CONTEXT - 1, (BATCH, 1), generator=picks)
        rows = ids[at + torch.arange(CONTEXT + 1)]
        return rows[:, :-1], rows[:, 1:]

    return draw


def hidden_characters(ids: Tensor, mask: int) -> Callable[[torch.Generator], Batch]:
    def draw(picks: torch.Generator) -> Batch:
        at = torch.randint(0, len(ids) - CONTEXT, (BATCH, 1), generator=picks)
        rows = ids[at + torch.arange(CONTEXT)]
        hidden = torch.rand(rows.shape, generator=picks) < 0.15
        return rows.masked_fill(hidden, mask), rows.masked_fill(~hidden, -100)

    return draw


def images_of(folder: Path) -> tuple[Tensor, Tensor]:
    files = [folder / "cifar-10-batches-bin" / f"data_batch_{i}.bin" for i in range(1, 6)]
    raw = np.concatenate([np.fromfile(f, dtype=np.uint8).reshape(-1, 3073) for f in files])
    images = torch.from_numpy(raw[:, 1:].reshape(-1, 3, 32, 32).astype(np.float32) / 127.5 - 1.0)
    return images, torch.from_numpy(raw[:, 0].astype(np.int64))


def pictures(images: Tensor, labels: Tensor) -> Callable[[torch.Generator], Batch]:
    def draw(picks: torch.Generator) -> Batch:
        at = torch.randint(0, len(images), (2 * BATCH,), generator=picks)
        return images[at], labels[at]

    return draw


def tasks(folder: Path, names: list[str]) -> dict[str, Task]:
    found = {}
    if {"gpt", "gpt2", "llama", "encoder"} & set(names):
        count, train, validation = characters_of(folder)
        draws = next_character(train), next_character(validation)
        hidden = hidden_characters(train, count), hidden_characters(validation, count)
        found |= {"gpt": Task(lambda: GPT(count), *draws), "gpt2": Task(lambda: gpt2(count), *draws)}
        found |= {"llama": Task(lambda: llama(count), *draws), "encoder": Task(lambda: Encoder(count), *hidden)}
    if "vit" in names:
        x, y = images_of(folder)
        found["vit"] = Task(ViT, pictures(x[:-5000], y[:-5000]), pictures(x[-5000:], y[-5000:]))
    return {name: found[name] for name in names}


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    out = model(batch[0])
    logits = out if isinstance(out, Tensor) else out.logits
    return F.cross_entropy(logits.flatten(0, -2), batch[1].flatten())


class PairedRun:
    """One of two runs on the same batches: a network, its optimizer and what it did so far."""

    def __init__(self, task: Task, seed: int, steps: int, options: dict[str, Any] | None) -> None:
        torch.manual_seed(seed)
        self.model = task.build().train()
        self.task, self.steps, self.step, self.seconds = task, steps, 0, 0.0
        self.picks = torch.Generator().manual_seed(seed)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=PEAK, betas=(0.9, 0.95), weight_decay=0.1)
        self.events: list[dict[str, Any]] = []
        self.apoptosis: Apoptosis | None = None
        if options is not None:
            example = task.train(torch.Generator().manual_seed(seed))[0][:4]
            self.apoptosis = Apoptosis(self.model, self.optimizer, example, log=self._note, **options)
            self.seconds += self.apoptosis.seconds

    def _note(self, entry: dict[str, Any]) -> None:
        self.events.append({k: entry.get(k) for k in ("step", "groups", "measured", "rolled_back", "reason")})

    def train(self, number: int) -> None:
        for _ in range(number):
            batch = self.task.train(self.picks)
            start = time.perf_counter()
            cosine = 0.5 * (1 + math.cos(math.pi * self.step / self.steps))
            for group in self.optimizer.param_groups:
                group["lr"] = PEAK * min(1.0, (self.step + 1) / FIRST) * (FLOOR + (1 - FLOOR) * cosine)
            loss = loss_of(self.model, batch)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.step += 1
            if self.apoptosis is not None:
                self.apoptosis.step()
            self.seconds += time.perf_counter() - start

    @torch.no_grad()
    def validate(self, batches: int = 16) -> float:
        self.model.eval()
        picks = torch.Generator().manual_seed(1)
        found = sum(float(loss_of(self.model, self.task.validation(picks))) for _ in range(batches)) / batches
        self.model.train()
        return found


def run(name: str, task: Task, seed: int, steps: int, options: dict[str, Any]) -> dict[str, Any]:
    """Train paired runs in turn and say what came of them."""
    pair = {"dense": PairedRun(task, seed, steps, None), "apoptosis": PairedRun(task, seed, steps, options)}
    for one, _, number in shared.in_turn(tuple(pair.values()), steps, TURN, seed):
        one.train(number)
    small = pair["apoptosis"]
    assert small.apoptosis is not None
    ledger = small.apoptosis.ledger()
    losses = {kind: one.validate() for kind, one in pair.items()}
    widths = {g.name: g.num_channels for g in small.apoptosis.groups()}
    result = {
        **{"network": name, "seed": seed, "steps": steps, "options": options},
        "validation_loss": losses,
        "difference": losses["apoptosis"] - losses["dense"],
        "seconds": {kind: one.seconds for kind, one in pair.items()},
        "speed_up": pair["dense"].seconds / small.seconds,
        "parameters": ledger.parameters,
        "macs": ledger.macs,
        "widths": widths,
        "events": small.events,
    }
    print(
        f"{name}, seed {seed}, {steps} steps: loss {losses['dense']:.4f} dense, {losses['apoptosis']:.4f} apoptosis "
        f"({result['difference']:+.4f}); {ledger.parameters[0] / ledger.parameters[1]:.2f}x fewer parameters, "
        f"{ledger.macs[0] / ledger.macs[1]:.2f}x fewer MACs, {result['speed_up']:.2f}x faster\n  {widths}",
        flush=True,
    )
    return result


def needs(name: str, task: Task, seed: int, steps: int, marks: list[int]) -> None:
    """Train without apoptosis; print how many channels of every group criterion `reconstruction` would keep on the way.

    "-": nothing would go.
    """
    one = PairedRun(task, seed, steps, None)
    picks = torch.Generator().manual_seed(9)
    batches = [task.train(picks)[0] for _ in range(8)]
    structure = analyse(one.model, (batches[0],), {})
    groups = [g for g in structure.groups if g.pin is None and not g.name.endswith(":heads")]
    print(name, ", ".join(f"{g.name} {g.num_channels}" for g in groups))
    for mark in marks:
        one.train(mark - one.step)
        observer = Observer(one.model, groups, seed=0, any_mode=True, replay=replay)
        observer.open()
        with torch.no_grad():
            for batch in batches:
                one.model(batch)
                observer.end_step()
        observer.close()
        criterion = get_criterion("reconstruction")
        request = Request(criterion=criterion, tolerance=criterion.tolerance, align=1, max_drop=1.0, seed=0)
        plan = make_plan(one.model, structure, observer.observations(), request)
        found = [plan.widths[g.name][1] if g.name in plan.widths else "-" for g in groups]
        print(f"step {mark}: {found}, validation loss {one.validate(8):.3f}", flush=True)


def main() -> int:
    parser = shared.parser(__doc__)
    parser.add_argument("--data-dir", required=True, type=Path)
    parser.add_argument("--only", default="gpt,gpt2,llama,encoder,vit")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--options", type=json.loads, default={}, help="JSON, further arguments of Apoptosis")
    parser.add_argument("--json", type=Path, help="write the result there")
    parser.add_argument("--needs", help="steps, comma-separated: what every group needs then, without apoptosis")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found = tasks(given.data_dir, given.only.split(","))
    options = {"total_steps": given.steps, **given.options}
    seeds = [int(seed) for seed in given.seeds.split(",")]
    for name, task in found.items() if given.needs else ():
        needs(name, task, seeds[0], given.steps, [int(mark) for mark in given.needs.split(",")])
    runs: list[dict[str, Any]] = []
    result = shared.result("transformers", runs=runs)
    for name, task in found.items() if not given.needs else ():
        for seed in seeds:
            runs.append(run(name, task, seed, given.steps, options))
            if given.json is not None:  # as far as it went
                shared.write(given.json, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
