"""Residual widths under LayerNorm and RMSNorm, where norms may make up for what goes (norm_widths="compensated")."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from families.family import Family

try:
    import transformers
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
except ImportError:
    transformers = None

VOCABULARY = 40
WIDTH = 16


class Block(nn.Module):
    """A pre-norm feed-forward block."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.norm, self.up, self.down = norm(WIDTH), nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Stream(nn.Module):
    """Embeddings, positions, blocks, a last norm and a head over one residual stream."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Parameter(torch.randn(5, WIDTH))
        self.blocks = nn.Sequential(Block(norm), Block(norm))
        self.norm, self.head = norm(WIDTH), nn.Linear(WIDTH, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(x) + self.positions)))


class WideRMSNorm(nn.Module):
    """RMS normalisation written out, as decoders have it, in the type that comes in."""

    def __init__(self, width: int, eps: float = 1e-2) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(width)), eps

    def forward(self, hidden: Tensor) -> Tensor:
        return self.weight * (hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


def encoder(norm_first: bool) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 24, batch_first=True, norm_first=norm_first)
        body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        return nn.Sequential(nn.Linear(8, WIDTH), body, nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3))

    return build


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=2, n_head=2, n_positions=16, tie_word_embeddings=False
        )
    )


def llama() -> nn.Module:
    """Its norms compute in float32 whatever comes in, which no test in float64 can look through: here they do not."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=32, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    for name, module in list(model.named_modules()):
        if isinstance(module, LlamaRMSNorm):
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, WideRMSNorm(WIDTH, module.variance_epsilon))
    return model


def numbers(rows: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (rows, 5))


def tokens(rows: int) -> dict[str, Any]:
    return {"input_ids": torch.randint(1, VOCABULARY, (rows, 6)), "use_cache": False}


def _family(name: str, build: Callable[[], nn.Module], example: Callable[[int], Any], group: str) -> Family:
    return Family(
        name=f"residual width, {name}", build=build, example=example, groups={group: 4}, norm_widths="compensated"
    )


FAMILIES = (
    _family("LayerNorm", lambda: Stream(nn.LayerNorm), numbers, "embed"),
    _family("RMSNorm", lambda: Stream(lambda width: nn.RMSNorm(width, eps=1e-2)), numbers, "embed"),
    _family("RMSNorm by hand", lambda: Stream(WideRMSNorm), numbers, "embed"),
    *(
        _family(f"nn.TransformerEncoder, {name}", encoder(first), lambda rows: torch.randn(rows, 6, 8), "0")
        for name, first in (("norm last", False), ("norm first", True))
    ),
)
if transformers is not None:
    FAMILIES = (
        *FAMILIES,
        _family("GPT-2", gpt2, tokens, "transformer.wte"),
        _family("Llama", llama, tokens, "model.embed_tokens"),
    )
