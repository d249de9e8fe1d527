"""What networks of a kind gain: the tables of docs/networks and of docs/from-torch-pruning.md.

Holds: which tasks, test families and networks of the zoo are of which kind, and the columns. Elsewhere: any measuring
(paper, coverage, zoo), files and markers (table.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.paper.kinds import name_of
from benchmarks.paper.method_table import TARGETS
from benchmarks.paper.summary import Cell, Row, summarise, table
from benchmarks.paper.tasks import BY_NAME

RESULTS = Path(__file__).resolve().parent / "results"
Record = Mapping[str, Any]
#: Reasons of pins, which begin with operators, as they are called by those who build such networks.
WORDS = {
    "native_layer_norm normalises over channels": "LayerNorm",
    "mean reduces over channels, as what normalises over channels does": "RMSNorm",
    "embedding looks the rows of up by number": "rows of an embedding table",
    "they share the width of in the rows of , which is pinned": "a width shared with what is held",
    "convolution normalises each row of over them": "standardised weights without a gain",
    "index computes with before it is used": "a table of biases, indexed",
}
LEAST = 0.005  # share of the multiply-adds below which a pin is not told
EMPTY = "No run is committed yet."


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One page. title: in words. tasks: of benchmarks.paper. families: of the tests. zoo: of timm and transformers."""

    title: str
    tasks: tuple[str, ...]
    families: tuple[str, ...]
    zoo: tuple[str, ...]


KINDS: Mapping[str, Kind] = {
    "fully-connected": Kind(
        title="fully connected",
        tasks=("mnist", "fashion-mnist", "higgs", "autoencoder"),
        families=("MLP", "MLP, tanh, batch norm", "autoencoder", "wide and deep", "DLRM, dot interactions"),
        zoo=("mixer_s32_224", "resmlp_12_224", "gmlp_s16_224"),
    ),
    "convolutional": Kind(
        title="convolutional",
        tasks=("cifar10", "cifar10-long", "cifar10-conv", "alexnet", "vgg11-cifar10", "resnet20-cifar10"),
        families=(
            "LeNet", "AlexNet", "VGG, batch norm", "ResNet, basic blocks", "ResNet, bottlenecks", "ResNeXt", "DenseNet",
            "Inception", "MobileNetV3", "EfficientNet", "ShuffleNetV2", "ConvNeXt", "U-Net, transposed", "C2f",
            "Res2Net",
        ),
        zoo=(
            "vgg11_bn", "resnet18", "resnext50_32x4d", "densenet121", "inception_v3", "mobilenetv3_small_100",
            "efficientnet_b0", "tf_efficientnetv2_b0", "regnety_002", "repvgg_a0", "nfnet_l0", "convnext_atto",
            "hrnet_w18", "resnetv2_50x1_bit",
        ),
    ),
    "transformers-from-scratch": Kind(
        title="transformers from scratch",
        tasks=("vit", "gpt"),
        families=(
            "nn.TransformerEncoder", "nn.TransformerDecoder", "nanoGPT, flash", "nanoGPT, whole heads", "SwiGLU",
            "experts, sparse", "ViT, sdpa", "Swin", "Llama, sdpa", "residual width, GPT-2", "residual width, Llama",
        ),
        zoo=(
            "vit_tiny_patch16_224", "deit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "gpt2", "llama", "mistral",
            "qwen3", "gemma3_text", "mixtral", "deepseek_v3", "t5",
        ),
    ),
    "pretrained": Kind(
        title="pretrained",
        tasks=("minilm-sst2", "minilm-trec", "efficientnet-cifar10"),
        families=("BERT, sdpa", "BERT, whole heads, sdpa", "T5", "ViT, whole heads", "Wav2Vec2",
                  "EfficientNet-Lite, convolutions called"),
        zoo=("bert", "distilbert", "roberta", "deberta-v2", "electra", "bart", "vit", "clip", "wav2vec2", "whisper",
             "tf_efficientnet_lite0"),
    ),
    "others": Kind(
        title="recurrent and others",
        tasks=(),
        families=("LSTM language model", "GRU, bidirectional", "LSTM cells", "GNN by matmul", "Mamba",
                  "linear attention, matmul", "GAN generator", "diffusion U-Net", "super-resolution", "audio encoder"),
        zoo=("xlstm", "rwkv", "mamba", "mamba2", "recurrent_gemma", "sequencer2d_s", "patchtst", "vits", "univnet"),
    ),
}  # fmt: skip


def gains(kind: Kind, cells: Sequence[Cell]) -> str:
    """Every run of a kind, against dense in the same process."""
    lines = [
        (
            f"{row.task}: {BY_NAME[_task(row)].network}",
            row.method,
            str(row.seeds),
            f"{row.cpu_speedup:.2f}x",
            f"{row.parameters:.2f}x",
            f"{row.macs:.2f}x",
            ", ".join(f"{ratio:.2f}x at {batch}" for batch, ratio in row.latency.items()),
            _metric(row),
            row.difference_text,
        )
        for row in _rows(kind, cells)
        if _is_told(row.method)
    ]
    head = ("data, network", "method", "seeds", "faster: whole run", "fewer parameters", "fewer multiply-adds",
            "faster: answers", "test metric", "difference to dense (95 %)")  # fmt: skip
    return table(head, lines) if lines else EMPTY


def overview(cells: Sequence[Cell]) -> str:
    """One row per kind: the span of its runs at default settings, and of those with a target."""
    lines = []
    for name, kind in KINDS.items():
        own = [row for row in _rows(kind, cells) if row.method.startswith("apoptosis") and _is_told(row.method)]
        for what, rows in (
            ("by default", [row for row in own if row.method == "apoptosis"]),
            ("`target=`", [row for row in own if row.method != "apoptosis"]),
        ):
            if rows:
                lines.append(
                    (
                        f"[{kind.title}]({name}.md), {what}",
                        str(len({_task(row) for row in rows})),
                        _span([row.cpu_speedup for row in rows], "x"),
                        _span([row.macs for row in rows], "x"),
                        _span([row.parameters for row in rows], "x"),
                        _span([row.difference for row in rows if row.unit == 100], " points", "+.2f"),
                    )
                )
    head = ("networks", "tasks", "faster: whole run", "fewer multiply-adds", "fewer parameters", "difference to dense")
    return table(head, lines) if lines else EMPTY


def against_torch_pruning(cells: Sequence[Cell]) -> str:
    """Apoptosis beside Torch-Pruning wherever both ran in one process, cut to the same multiply-adds."""
    lines = []
    for task in (t for kind in KINDS.values() for t in kind.tasks):
        rows = {row.method: row for row in summarise([_renamed(cell) for cell in cells if cell["task"] == task])}
        for method, own in rows.items():
            other = rows.get(method.replace("apoptosis", "torch-pruning")) if "apoptosis" in method else None
            if other is not None:
                pairs = (
                    [f"{row.cpu_speedup:.2f}x" for row in (own, other)],
                    [f"{row.macs:.2f}x" for row in (own, other)],
                    [f"{row.parameters:.2f}x" for row in (own, other)],
                    [row.difference_text for row in (own, other)],
                )
                lines.append(
                    (
                        own.task,
                        method.removeprefix("apoptosis").lstrip(", ") or "default",
                        str(own.seeds),
                        *(", ".join(pair) for pair in pairs),
                    )
                )
    head = ("data", "target", "seeds", "faster: whole run", "fewer multiply-adds", "fewer parameters",
            "difference to dense (95 %)")  # fmt: skip
    return table(head, lines) if lines else EMPTY


def may_shrink(kind: Kind) -> str:
    """Of the test families and of real networks: what may shrink at most, and what holds the rest back."""
    small = json.loads((RESULTS / "coverage.json").read_text(encoding="utf-8"))["families"]
    zoo: dict[str, Record] = {}
    for rows in json.loads((RESULTS / "zoo.json").read_text(encoding="utf-8"))["families"].values():
        zoo |= rows
    lines = [
        (f"{name}, small", f"{100 * small[name]['removable'] / small[name]['channels']:.0f} % of the channels",
         _words(g["pin"] for g in small[name]["groups"].values()))
        for name in kind.families
    ]  # fmt: skip
    lines += [
        (f"`{name}`", f"{100 * zoo[name]['share']:.0f} % of the multiply-adds",
         _words(why for why, pin in zoo[name]["pins"].items() if pin["share"] >= LEAST))
        for name in kind.zoo
    ]  # fmt: skip
    return table(("network", "may shrink", "the rest is held by"), lines)


def _words(reasons: Iterable[str | None]) -> str:
    """Return each reason once, the network's outputs left out."""
    found = dict.fromkeys(WORDS.get(why, why) for why in reasons if why not in (None, "output"))
    return "; ".join(found) or "nothing"


def _rows(kind: Kind, cells: Sequence[Cell]) -> list[Row]:
    return [
        row
        for task in kind.tasks
        for row in summarise([_renamed(cell) for cell in cells if cell["task"] == task])
    ]  # fmt: skip


def _renamed(cell: Cell) -> Cell:
    return {**cell, "task": name_of(cell)}


def _task(row: Row) -> str:
    return row.task.partition(",")[0]


def _is_told(method: str) -> bool:
    """Whether a method is not one of the other criteria, which have a table of their own."""
    return not method.startswith("apoptosis, ") or method.removeprefix("apoptosis, ") in TARGETS


def _metric(row: Row) -> str:
    if row.metric_name == "-nats":
        return f"{-row.metric:.4f} nats"
    return f"{100 * row.metric:.2f} %" if row.unit == 100 else f"{row.metric_name} {row.metric:.4f}"


def _span(values: Sequence[float], unit: str, form: str = ".2f") -> str:
    if not values:
        return ""
    low, high = (f"{value:{form}}{unit}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def tables(read: Callable[[], Sequence[Cell]]) -> dict[str, Callable[[Mapping[str, Record]], str]]:
    """Return the tables by the names of their markers. read: gives the cells."""
    found: dict[str, Callable[[Mapping[str, Record]], str]] = {
        "expected": lambda results: overview(read()),
        "against-torch-pruning": lambda results: against_torch_pruning(read()),
    }
    for name, kind in KINDS.items():
        if kind.tasks:
            found[f"gains-{name}"] = lambda results, kind=kind: gains(kind, read())
        found[f"may-shrink-{name}"] = lambda results, kind=kind: may_shrink(kind)
    return found
