"""All families, by name; the modules that hold them are a literal list."""

from __future__ import annotations

from importlib import import_module

from families.family import Family

#: Every module has a tuple FAMILIES. A module that needs an extra returns an empty one where it is not installed.
MODULES = (
    "classic", "convolutional", "mobile", "generative", "mixed", "pruning", "other", "language", "vision_transformers",
    "products", "residual", "functional", "branches", "scores",
)  # fmt: skip

#: Near twins of other families: an ordinary run of the tests asks them in float64 only, and not everything.
VARIANTS = frozenset({
    "BERT, eager", "GPT-2, eager", "Llama, eager", "ViT, eager", "BERT, masked words", "BERT, whole heads, sdpa",
    "Mistral", "Qwen2", "T5, gated", "T5, whole heads", "Swin, whole heads", "DeiT", "nanoGPT, own scale",
    "nanoGPT, flash", "cross-attention, einsum", "cross-attention, whole heads, matmul", "torch: Conv2dBias",
    "nn.TransformerEncoder, norm first", "nanoGPT, whole heads", "GPT-2, whole heads", "BERT, whole heads, eager",
    "torch: Conv2dActivation", "torch: Conv2dPoolFlattenFunctional", "SwiGLU", "ReGLU, fused",
    "Mixtral, experts in batches", "linear attention, einsum",
})  # fmt: skip

FAMILIES: dict[str, Family] = {}
for _name in MODULES:
    for _family in import_module(f"families.{_name}").FAMILIES:
        if _family.name in FAMILIES:
            raise ValueError(f"two families are called '{_family.name}'.")
        FAMILIES[_family.name] = _family
