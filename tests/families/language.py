"""Language models as `transformers` builds them: encoders, decoders, both, experts, and state spaces.

Configurations are small and random, nothing is downloaded; without `transformers` there are no families here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from families.family import Family

try:
    import transformers
except ImportError:
    transformers = None

VOCABULARY = 40

#: What the configurations of Llama and its kin agree on.
DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}


def tokens(length: int = 6, **more: Any) -> Callable[[int], dict[str, Any]]:
    """Inputs of a decoder: token numbers, and what else the forward pass is given."""
    return lambda rows: {"input_ids": torch.randint(1, VOCABULARY, (rows, length)), **more}


def translation(rows: int) -> dict[str, Any]:
    """Inputs of an encoder and decoder; the longer source is padded."""
    mask = torch.ones(rows, 7, dtype=torch.long)
    mask[::3, 5:] = 0
    return {
        "input_ids": torch.randint(1, VOCABULARY, (rows, 7)),
        "attention_mask": mask,
        "decoder_input_ids": torch.randint(1, VOCABULARY, (rows, 5)),
        "use_cache": False,
    }


def padded(rows: int) -> dict[str, Any]:
    """Inputs of an encoder: token numbers, two kinds of segments, and a mask of padding."""
    mask = torch.ones(rows, 6, dtype=torch.long)
    mask[::2, 4:] = 0
    kinds = torch.zeros(rows, 6, dtype=torch.long)
    kinds[:, 3:] = 1
    return {"input_ids": torch.randint(1, VOCABULARY, (rows, 6)), "attention_mask": mask, "token_type_ids": kinds}


def build(model: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    """Build a model of `transformers` by the names of its class and of its configuration's class."""
    return lambda: getattr(transformers, model)(getattr(transformers, config)(**settings))


def bert(model: str, attention: str, num_heads: int = 2) -> Callable[[], nn.Module]:
    return build(
        model, "BertConfig", vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=num_heads,
        intermediate_size=24, max_position_embeddings=16, num_labels=4, attn_implementation=attention,
    )  # fmt: skip


def gpt2(attention: str, num_heads: int = 2) -> Callable[[], nn.Module]:
    return build(
        "GPT2LMHeadModel", "GPT2Config", vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=num_heads, n_inner=24,
        n_positions=16, attn_implementation=attention, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip


def t5(feed_forward: str, num_layers: int, num_heads: int = 2) -> Callable[[], nn.Module]:
    return build(
        "T5ForConditionalGeneration", "T5Config", vocab_size=VOCABULARY, d_model=16, d_kv=6, d_ff=24,
        num_layers=num_layers, num_heads=num_heads, relative_attention_num_buckets=8, decoder_start_token_id=0,
        feed_forward_proj=feed_forward,
    )  # fmt: skip


def mamba() -> nn.Module:
    return build(
        "MambaForCausalLM", "MambaConfig", vocab_size=VOCABULARY, hidden_size=12, state_size=4, num_hidden_layers=2,
        expand=2, conv_kernel=3, time_step_rank=3, use_mambapy=False,
    )()  # fmt: skip


def every_layer(stem: str, groups: dict[str, int], num_layers: int = 2) -> dict[str, int]:
    """Groups by their names within a layer, for all layers: `{}` in the stem stands for its number."""
    return {f"{stem.format(i)}.{name}": planted for i in range(num_layers) for name, planted in groups.items()}


BERT_GROUPS = every_layer(
    "bert.encoder.layer.{}",
    {"attention.self.query": 4, "attention.self.value": 4, "intermediate.dense": 6},
)
GPT2_GROUPS = every_layer("transformer.h.{}", {"attn.c_attn": 4, "mlp.c_fc": 6})

#: Frequencies are one buffer for all layers, so that rotary pairs of queries and keys are one group.
PAIRS = {"model.layers.0.self_attn.q_proj": 1}
PHI_LAYER = {"self_attn.v_proj": 4, "mlp.fc1": 6}
# half of the queries is not rotated, and makes room in rows as wide as those of values; the rotated half of all layers
# is one group, named after the first, and stays
PHI_REST = {"model.layers.0.self_attn.q_proj#2": 2, "model.layers.1.self_attn.q_proj": 2}
LLAMA_GROUPS = {**PAIRS, **every_layer("model.layers.{}", {"self_attn.v_proj": 4, "mlp.gate_proj": 6})}


def t5_groups(hidden: str, num_layers: int) -> dict[str, int]:
    inside = {"q": 4, "v": 4}
    places = (
        ("encoder.block.{}.layer.0.SelfAttention", inside),
        ("encoder.block.{}.layer.1.DenseReluDense", {hidden: 6}),
        ("decoder.block.{}.layer.0.SelfAttention", inside),
        ("decoder.block.{}.layer.1.EncDecAttention", inside),
        ("decoder.block.{}.layer.2.DenseReluDense", {hidden: 6}),
    )
    layers = (every_layer(stem, groups, num_layers) for stem, groups in places)
    return {name: planted for layer in layers for name, planted in layer.items()}


def family(name: str, build: Callable[[], nn.Module], example: Any, groups: dict[str, int], **more: Any) -> Family:
    return Family(name=name, build=build, example=example, groups=groups, **more)


def turned(name: str, config: str, groups: dict[str, int], **settings: Any) -> Family:
    """A decoder with rotary positions, by the name of its configuration's class."""
    model = build(f"{config}ForCausalLM", f"{config}Config", **DECODER, **settings)
    return family(name, model, tokens(use_cache=False), groups)


def _families() -> Iterator[Family]:
    plain = tokens(use_cache=False)
    for attention in ("eager", "sdpa"):
        pooled = {**BERT_GROUPS, "bert.pooler.dense": 4}
        yield family(f"BERT, {attention}", bert("BertForSequenceClassification", attention), padded, pooled)
        yield family(f"GPT-2, {attention}", gpt2(attention), plain, GPT2_GROUPS)
        yield turned(f"Llama, {attention}", "Llama", LLAMA_GROUPS, attn_implementation=attention)
    yield family("BERT, masked words", bert("BertForMaskedLM", "sdpa"), padded, BERT_GROUPS)
    yield turned("Mistral", "Mistral", LLAMA_GROUPS, sliding_window=4)
    yield turned("Qwen2", "Qwen2", LLAMA_GROUPS, tie_word_embeddings=True)
    yield turned("Phi", "Phi", {**PHI_REST, **every_layer("model.layers.{}", PHI_LAYER)}, partial_rotary_factor=0.5)
    inside = every_layer("model.layers.{}", {"self_attn.v_proj": 4, "mlp.experts": 6})
    experts = {"num_local_experts": 3, "num_experts_per_tok": 2}
    for name, way in (("", "eager"), (", experts in batches", "batched_mm")):  # "grouped_mm" takes no float64
        yield turned(f"Mixtral{name}", "Mixtral", {**PAIRS, **inside}, **experts, experts_implementation=way)
    yield family("T5", t5("relu", 2), translation, t5_groups("wi", 2))
    yield family("T5, gated", t5("gated-gelu", 1), translation, t5_groups("wi_0", 1))
    heads = every_layer("bert.encoder.layer.{}", {"attention.self:heads": 1})
    for attention in ("eager", "sdpa"):
        whole = bert("BertForSequenceClassification", attention, 4)
        yield family(f"BERT, whole heads, {attention}", whole, padded, heads)
    heads = every_layer("transformer.h.{}", {"attn:heads": 1})
    yield family("GPT-2, whole heads", gpt2("sdpa", 4), plain, heads)
    # heads of queries on the encoder are as many in all layers: one tensor of zeros is added to the scores of all
    stems = ("encoder.block.0.layer.0.Self", "decoder.block.0.layer.0.Self")
    stems += tuple(f"decoder.block.{i}.layer.1.EncDec" for i in range(2))
    heads = {f"{stem}Attention:heads": 1 for stem in stems}
    yield family("T5, whole heads", t5("relu", 2, 4), translation, heads)
    inner = every_layer("backbone.layers.{}", {"mixer.in_proj": 6})
    yield family("Mamba", mamba, plain, inner)


FAMILIES = () if transformers is None else tuple(_families())
