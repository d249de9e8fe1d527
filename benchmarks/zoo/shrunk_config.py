"""Configurations of transformers made small, from the names of their fields alone.

Holds: which field is a number of layers, a width, a vocabulary. Elsewhere: models, inputs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

WIDTH, HEADS, VOCABULARY, EXPERTS, ROWS = 64, 4, 128, 4, 2
FULL = ("layers", "vocabulary", "experts", "widths", "images")
STEPS = (FULL, ("layers", "vocabulary", "experts"), ("layers",), ())
"""What is made smaller, from the smallest to the configuration as it stands; the first that builds and runs counts."""

_MAIN = ("hidden_size", "d_model", "n_embd", "embed_dim", "dim", "emb_dim", "hidden_dim", "embedding_dim")
_LAYERS = re.compile(r"(^|_)(num_)?(hidden_|encoder_|decoder_)?(n_)?(layers?|blocks)$|^depth$|_num_hidden_layers$")
_NO_LAYERS = re.compile(r"feat_extract|feature_layer|select_layer|adapter_layers|feature_levels|window_layers|dense_l")
_STAGES = re.compile(r"^(depths|layers|num_blocks|stage_num_blocks|num_layers|layer_depths|encoder_depths)$")
_VOCABULARY = re.compile(r"(^|_)(vocab_size|n_words|n_tokens|entity_vocab_size|codebook_size)$")
_TOKEN = re.compile(r"_(token|start|end)_(id|index)$|_token_index$|_token_id$|_id$|_index$")
_EXPERTS = re.compile(r"^(num|n|moe_num|moe)_?(local_|routed_)?experts$|^moe_num_experts$")
_CHOSEN = re.compile(r"experts_per_tok|^moe_topk$|^moe_k$|^top_?k$|num_selected_experts|expert_top_k")
_HEADS = re.compile(r"(^|_)(num_|n_)?(attention_)?heads?$|attention_heads$|_n_heads$")
_KEYS = re.compile(r"key_value_heads|kv_heads|num_query_groups")
_HEAD_SIZE = re.compile(
    r"head_dim$|^d_kv$|^kv_channels$|^d_head$|attention_head_size|^qk_head_dim$|mamba_d_head|head_size$"
)
_WIDTH = re.compile(
    r"hidden_size$|intermediate_size$|ffn_dim$|ffn_hidden_size$|d_ff$|n_inner$|projection_dim$|embed_dim$|d_model$|"
    r"n_embd$|^dim$|hidden_dim$|embedding_size$|mlp_dim$|lora_rank$|dim_feedforward$|feedforward_dim$|inner_dim$|"
    r"_intermediate_dim$|pooler_output_size$|^emb_dim$|d_inner$|lru_width|mamba_d_ssm|^ffn_size$|out_hidden_size$"
)
_PERIOD = re.compile(r"period$|interval$|every_n|pattern$|_freq$|sparse_step$")
_FIRST = re.compile(r"offset$|first_k_dense|num_dense_layers")
_GROUPS = re.compile(r"^(n_group|topk_group|num_groups_routing)$")
_OF_NONE = {"vocab_size": VOCABULARY, "n_routed_experts": EXPERTS, "prediction_length": 8, "pad_token_id": 1,
            "n_shared_experts": 1, "num_experts": EXPERTS}  # fmt: skip
_DROPPED = frozenset(("id2label", "label2id", "transformers_version", "architectures", "_name_or_path", "dtype",
                      "torch_dtype", "attn_implementation", "_attn_implementation"))  # fmt: skip


def shrunk(config: Mapping[str, Any], steps: Sequence[str]) -> dict[str, Any]:
    """The same fields with smaller numbers; nested configurations likewise.

    Args:
        config: as `to_dict()` gives it. steps: of FULL, what may be made smaller.
    """
    out = {key: value for key, value in config.items() if key not in _DROPPED}
    out.update({key: value for key, value in _OF_NONE.items() if key in out and out[key] is None})
    if out.get("use_pretrained_backbone"):
        out["use_pretrained_backbone"] = False
    if "layers" in steps:
        _fewer_layers(out)
    main = next((out[key] for key in _MAIN if isinstance(out.get(key), int) and out[key] > WIDTH), None)
    for key, value in list(out.items()):
        if isinstance(value, dict) and "model_type" in value:
            out[key] = {"model_type": value["model_type"], **shrunk(value, steps)}
        elif isinstance(value, int) and not isinstance(value, bool):
            out[key] = _number(key, value, steps, main)
    if "images" in steps:
        _smaller_images(out)
    if "use_cache" in out:
        out["use_cache"] = False
    return out


def _number(key: str, value: int, steps: Sequence[str], main: int | None) -> int:
    """One field."""
    if "vocabulary" in steps:
        if _VOCABULARY.search(key) and "type" not in key:
            return min(value, VOCABULARY)
        if _TOKEN.search(key) and value >= VOCABULARY:
            return VOCABULARY - 1 - value % 16
    if "experts" in steps:
        if _EXPERTS.search(key):
            return min(value, EXPERTS)
        if _CHOSEN.search(key):
            return min(value, 2)
        if _GROUPS.search(key):
            return 1
    if "widths" in steps and main is not None:
        return _narrower(key, value, main)
    return value


def _narrower(key: str, value: int, main: int) -> int:
    if _KEYS.search(key):
        return value if value < 2 else HEADS // 2 if value < 8 else HEADS
    if _HEADS.search(key):
        return min(value, HEADS)
    if _HEAD_SIZE.search(key):
        return min(value, max(8, value * WIDTH // (HEADS * 64)))
    if _WIDTH.search(key) and value > 16:
        return max(16, round(value * WIDTH / main / 16) * 16)
    return value


def _fewer_layers(out: dict[str, Any]) -> None:
    """Few layers of every kind there is: of lists with an entry per layer, the first entry of each kind."""
    number = next((out[k] for k in ("num_hidden_layers", "n_layer", "num_layers") if isinstance(out.get(k), int)), None)
    lists = {k: v for k, v in out.items() if isinstance(v, list | tuple) and number and len(v) == number > ROWS}
    kept = list(range(ROWS))
    if lists:
        kinds: dict[str, int] = {}
        for i in range(number or 0):
            kinds.setdefault(str([v[i] for v in lists.values()]), i)
        kept = sorted({*list(kinds.values())[:4], *range(ROWS)})
        out.update({k: [v[i] for i in kept] for k, v in lists.items()})
    for key, value in out.items():
        if isinstance(value, list | tuple) and _STAGES.search(key) and all(isinstance(v, int) for v in value):
            out[key] = [min(v, ROWS) for v in value]
        elif not isinstance(value, int) or isinstance(value, bool):
            continue
        elif key in ("num_hidden_layers", "n_layer", "num_layers"):
            out[key] = min(value, max(len(kept), ROWS))
        elif _LAYERS.search(key) and not _NO_LAYERS.search(key):
            out[key] = min(value, ROWS)
        elif _PERIOD.search(key):
            out[key] = min(value, 2)
        elif _FIRST.search(key):
            out[key] = min(value, 1)


def _smaller_images(out: dict[str, Any]) -> None:
    patch, image = out.get("patch_size"), out.get("image_size")
    if isinstance(patch, int) and isinstance(image, int) and image > 4 * patch and "window_size" not in out:
        out["image_size"] = 4 * patch
