"""Vision and speech models as `transformers` builds them, small and random; without `transformers` there are none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from families.family import Family
from families.language import build, every_layer, family, transformers

#: What the configurations of ViT and DeiT agree on.
PATCHES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 16,
    "patch_size": 8,
    "num_labels": 4,
}


def pictures(rows: int) -> dict[str, Any]:
    return {"pixel_values": torch.randn(rows, 3, 16, 16)}


def sounds(rows: int) -> dict[str, Any]:
    return {"input_values": torch.randn(rows, 200)}


def attended(prefix: str) -> dict[str, int]:
    inside = {"attention.attention.key": 4, "attention.attention.value": 4, "intermediate.dense": 6}
    return every_layer(f"{prefix}.encoder.layer.{{}}", inside)


def _stages(stem: str, inside: dict[str, int]) -> dict[str, int]:
    """Groups of every layer of two stages: `{}` in the stem stands for the stage."""
    stages = (every_layer(f"{stem.format(stage)}.{{}}", inside) for stage in range(2))
    return {name: planted for stage in stages for name, planted in stage.items()}


def _families() -> Iterator[Family]:
    for attention in ("eager", "sdpa"):
        vit = build("ViTForImageClassification", "ViTConfig", **PATCHES, attn_implementation=attention)
        yield family(f"ViT, {attention}", vit, pictures, attended("vit"))
    deit = build("DeiTForImageClassification", "DeiTConfig", **PATCHES)
    yield family("DeiT", deit, pictures, attended("deit"))
    swin = build(
        "SwinForImageClassification", "SwinConfig", image_size=16, patch_size=2, embed_dim=8, depths=[2, 2],
        num_heads=[2, 4], window_size=4, mlp_ratio=2.0, num_labels=4, drop_path_rate=0.0,
    )  # fmt: skip
    inside = {"attention.self.query": 4, "attention.self.value": 4, "intermediate.dense": 6}
    groups = _stages("swin.encoder.layers.{}.blocks", inside)
    yield family("Swin", swin, pictures, groups, rows=32)
    heads = every_layer("swin.encoder.layers.1.blocks.{}", {"attention.self:heads": 1})
    yield family("Swin, whole heads", swin, pictures, heads, rows=32)
    vit = build("ViTForImageClassification", "ViTConfig", **PATCHES | {"num_attention_heads": 4})
    heads = every_layer("vit.encoder.layer.{}", {"attention.attention:heads": 1})
    yield family("ViT, whole heads", vit, pictures, heads)
    convnext = build(
        "ConvNextForImageClassification", "ConvNextConfig", patch_size=2, hidden_sizes=[8, 12], depths=[2, 2],
        num_stages=2, num_labels=4, image_size=16, layer_scale_init_value=0.5,
    )  # fmt: skip
    blocks = _stages("convnext.encoder.stages.{}.layers", {"pwconv1": 6})
    yield family("ConvNeXt, transformers", convnext, pictures, blocks, rows=32)
    speech = build(
        "Wav2Vec2ForCTC", "Wav2Vec2Config", vocab_size=12, hidden_size=16, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=24, conv_dim=(8, 8, 8), conv_stride=(4, 2, 2),
        conv_kernel=(8, 3, 2), num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, layerdrop=0.0,
        apply_spec_augment=False,
    )  # fmt: skip
    stack = every_layer("wav2vec2.feature_extractor.conv_layers.{}", {"conv": 2})
    inside = {"attention.q_proj": 4, "attention.v_proj": 4, "feed_forward.intermediate_dense": 6}
    groups = {**stack, **every_layer("wav2vec2.encoder.layers.{}", inside)}
    yield family("Wav2Vec2", speech, sounds, groups, rows=32)


FAMILIES = () if transformers is None else tuple(_families())
