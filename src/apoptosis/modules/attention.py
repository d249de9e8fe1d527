"""nn.MultiheadAttention with heads narrower than its own forward pass allows.

Holds: the class that a narrowed nn.MultiheadAttention becomes, and what an event makes of its attributes.
Elsewhere: attributes of any other module (attributes.py, splits.py), exchanging the class (transaction.py,
checkpoint/save_load.py).

torch reads the size of a head off `embed_dim`, which is also the width of what goes in and out, and hands modules of
its own in evaluation mode to one fused kernel that does so, too. So an event that edits one gives it another class,
under its identity.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apoptosis.errors import ShapeError
from apoptosis.records import TensorEdit

_PROJECTIONS = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
_OWN = ("embed_dim", "kdim", "vdim", "num_heads", "head_dim", "query_width", "value_width", "head_scale")
_STOCK_FORWARD = nn.MultiheadAttention.forward


class ShrunkMultiheadAttention(nn.MultiheadAttention):
    """What an nn.MultiheadAttention becomes when heads lose channels, or are lost.

    Same call, same results: masks, weights, unbatched and nested inputs as in torch. Scores keep the scale of the heads
    as they were built. Modules get this class from an event or from `load`; there is no reason to construct one.

    query_width: rows of the query projection, and of the key projection, over all heads. value_width: of the value
    projection. head_scale: factor of the scores. `embed_dim`, `kdim` and `vdim` are the widths of the inputs alone.
    """

    query_width: int
    value_width: int
    head_scale: float

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute attention; see nn.MultiheadAttention.forward."""
        if query.is_nested or key.is_nested or value.is_nested:
            return self._nested(query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights)
        batched, first = query.dim() == 3, self.batch_first or query.dim() == 2
        if query.dim() not in (2, 3) or not query.dim() == key.dim() == value.dim():
            dims = (query.dim(), key.dim(), value.dim())
            raise RuntimeError(f"query, key and value of {dims} dims: they are either 2 (unbatched) or 3 all alike.")
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        q, k, v = (self._heads(x, batched, first) for x in self._projected(query, key, value))
        if is_causal and key_padding_mask is None and not need_weights:
            mask = None
        else:
            mask, is_causal = self._merged(attn_mask, key_padding_mask, q, k.shape[2]), False
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            scores = (q * self.head_scale) @ k.transpose(-2, -1)
            weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
            weights = F.dropout(weights, p=dropout) if dropout > 0.0 else weights
            attended = weights @ v
        else:
            attended = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal, scale=self.head_scale)
        laid = attended.transpose(1, 2) if first else attended.permute(2, 0, 1, 3)
        out = F.linear(laid.flatten(-2), self.out_proj.weight, self.out_proj.bias)
        out = out if batched else out.squeeze(0)
        if not need_weights:
            return out, None
        weights = weights.mean(dim=1) if average_attn_weights else weights
        return out, weights if batched else weights.squeeze(0)

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project to queries, keys and values, all heads side by side."""
        first, second = self.query_width, 2 * self.query_width
        packed, bias = self._parameters["in_proj_weight"], self._parameters["in_proj_bias"]
        if packed is not None and query is key and key is value:  # one product is quicker than three
            all_three = F.linear(query, packed, bias)
            return all_three[..., :first], all_three[..., first:second], all_three[..., second:]
        if packed is not None:
            weights = packed[:first], packed[first:second], packed[second:]
        else:
            weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        biases = (None, None, None) if bias is None else (bias[:first], bias[first:second], bias[second:])
        return (
            F.linear(query, weights[0], biases[0]),
            F.linear(key, weights[1], biases[1]),
            F.linear(value, weights[2], biases[2]),
        )

    def _heads(self, x: Tensor, batched: bool, batch_first: bool) -> Tensor:
        """Lay out as (batch, heads, length, size of a head)."""
        x = x if batched else x.unsqueeze(0)
        x = x.reshape(*x.shape[:-1], self.num_heads, -1)
        return x.transpose(1, 2) if batch_first else x.permute(1, 2, 0, 3)

    def _merged(self, mask: Tensor | None, padding: Tensor | None, q: Tensor, source: int) -> Tensor | None:
        """Add both masks up, as (batch or 1, heads or 1, target, source)."""
        batch, heads, target = q.shape[:3]
        if mask is not None:
            expected = (target, source) if mask.dim() == 2 else (batch * heads, target, source)
            if tuple(mask.shape) != expected:
                raise RuntimeError(f"The shape of the attn_mask is {tuple(mask.shape)}, but should be {expected}.")
            mask = _additive(mask, q.dtype)
            mask = mask if mask.dim() == 2 else mask.view(batch, heads, target, source)
        if padding is not None:
            if padding.numel() != batch * source:
                raise RuntimeError(f"The shape of the key_padding_mask is {tuple(padding.shape)}: {batch} x {source}.")
            padding = _additive(padding, q.dtype).view(batch, 1, 1, source)
            mask = padding if mask is None else mask + padding
        return mask

    def _nested(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        average_attn_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Self-attention of sequences of different lengths, as nn.TransformerEncoder passes them in evaluation mode."""
        if query is not key or key is not value or key_padding_mask is not None or attn_mask is not None:
            raise RuntimeError("Nested tensors are supported in self-attention without masks alone.")
        lengths = [part.shape[0] for part in query.unbind()]
        x = query.to_padded_tensor(0.0)
        ends = torch.tensor(lengths, device=x.device, dtype=torch.int64)
        padding = torch.arange(x.shape[1], device=x.device)[None] >= ends[:, None]
        x = x if self.batch_first else x.transpose(0, 1)
        out, weights = self.forward(x, x, x, padding, need_weights, None, average_attn_weights)
        out = out if self.batch_first else out.transpose(0, 1)
        return torch._nested_tensor_from_mask(out, ~padding), weights


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn a mask that is True where nothing is to be read into one that is added to the scores."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
    if not mask.is_floating_point():
        raise RuntimeError(f"a mask is bool or floating point, not {mask.dtype}.")
    return mask


def is_attention(module: nn.Module) -> bool:
    """Whether a module runs the forward pass of nn.MultiheadAttention or ShrunkMultiheadAttention."""
    return isinstance(module, nn.MultiheadAttention) and type(module).forward in (
        _STOCK_FORWARD,
        ShrunkMultiheadAttention.forward,
    )


def attention_attributes(module: nn.Module) -> dict[str, Any]:
    """Return the name of the class, widths and scale of a narrowed attention; nothing for other modules."""
    if not isinstance(module, ShrunkMultiheadAttention):
        return {}
    found = {name: getattr(module, name) for name in (*_OWN, "_qkv_same_embed_dim")}
    return {"__class__": ShrunkMultiheadAttention.__name__, **found}


def shrunk_attributes(module: nn.MultiheadAttention) -> dict[str, Any]:
    """Return the attributes that turn an nn.MultiheadAttention into a narrowed one of the same widths, with its class.

    Raises: ShapeError: it has learned or zero rows beside the keys, or a class derived by the user.

    Example:
        >>> shrunk_attributes(nn.MultiheadAttention(8, 2))["query_width"]
        8
    """
    if module.bias_k is not None or module.bias_v is not None or module.add_zero_attn:
        raise ShapeError("nn.MultiheadAttention with add_bias_kv or add_zero_attn cannot be narrowed.")
    if type(module) not in (nn.MultiheadAttention, ShrunkMultiheadAttention):
        raise ShapeError(
            f"{type(module).__name__} derives from nn.MultiheadAttention, and its class cannot be exchanged."
        )
    if isinstance(module, ShrunkMultiheadAttention):
        found = {name: getattr(module, name) for name in _OWN}
    else:
        width, size = module.embed_dim, module.head_dim
        found = {name: getattr(module, name) for name in _OWN[:5]}
        found |= {"query_width": width, "value_width": width, "head_scale": math.sqrt(1.0 / float(size))}
    # torch's layers ask this before they pass weights to a kernel that reads the size of a head off embed_dim
    return {**found, "_qkv_same_embed_dim": False, "__class__": ShrunkMultiheadAttention}


def attention_changes(module: nn.Module, edited: Mapping[int, TensorEdit]) -> dict[str, Any]:
    """Return the new attributes of an attention after edits, with its class.

    Args:
        module: any module; one whose forward pass is the user's own is left alone.
        edited: id of a tensor before the event -> its edit.

    Returns: attribute -> new value; empty when none of its tensors loses anything.

    Raises: ShapeError: heads that would end unequal, and see `shrunk_attributes`.
    """
    if not isinstance(module, nn.MultiheadAttention) or not is_attention(module):
        return {}
    parameters = {**module._parameters, **{f"out_proj.{n}": p for n, p in module.out_proj._parameters.items()}}
    keep: dict[str, Mapping[int, Tensor]] = {
        name: edited[id(p)].keep for name, p in parameters.items() if p is not None and id(p) in edited
    }
    if not any(keep.values()):
        return {}
    found = shrunk_attributes(module)
    width, value_width = int(found["query_width"]), int(found["value_width"])
    left = _kept_rows(module, keep, (width, width, value_width))
    per_head = [
        torch.bincount(rows // (size // module.num_heads), minlength=module.num_heads)
        for rows, size in zip(left, (width, width, value_width), strict=True)
    ]
    stays = per_head[0] > 0
    if any(bool((count[stays] != count[stays][0]).any() or count[~stays].any()) for count in per_head):
        counts = "; ".join(str(count.tolist()) for count in per_head)
        raise ShapeError(
            f"an nn.MultiheadAttention would be left with unequal heads (rows of q; k; v per head: {counts})."
        )
    if left[0].numel() != left[1].numel() or not all(int(count[stays].min()) for count in per_head):
        raise ShapeError("queries and keys of an nn.MultiheadAttention would have different widths, or heads none.")
    num_heads = int(stays.sum())
    inputs = _input_widths(module, keep)
    return found | {
        "num_heads": num_heads,
        "head_dim": left[0].numel() // num_heads,
        "query_width": left[0].numel(),
        "value_width": left[2].numel(),
        **dict(zip(("embed_dim", "kdim", "vdim"), inputs, strict=True)),
    }


def _kept_rows(
    module: nn.MultiheadAttention, keep: Mapping[str, Mapping[int, Tensor]], sizes: tuple[int, int, int]
) -> list[Tensor]:
    """Kept rows of each projection, counted from its first; biases have to keep the same."""
    if module._parameters["in_proj_weight"] is not None:
        left = _parts(keep.get("in_proj_weight", {}).get(0), sizes)
    else:
        left = [
            torch.arange(size, device="cpu") if 0 not in keep.get(name, {}) else keep[name][0].cpu()
            for name, size in zip(_PROJECTIONS, sizes, strict=True)
        ]
    if module._parameters["in_proj_bias"] is not None:
        biases = _parts(keep.get("in_proj_bias", {}).get(0), sizes)
        if not all(torch.equal(a, b) for a, b in zip(left, biases, strict=True)):
            raise ShapeError("the projections of an nn.MultiheadAttention and their biases would keep different rows.")
    return left


def _parts(keep: Tensor | None, sizes: tuple[int, int, int]) -> list[Tensor]:
    rows = torch.arange(sum(sizes), device="cpu") if keep is None else keep.cpu()
    starts = (0, sizes[0], sizes[0] + sizes[1])
    return [rows[(rows >= start) & (rows < start + size)] - start for start, size in zip(starts, sizes, strict=True)]


def _input_widths(module: nn.MultiheadAttention, keep: Mapping[str, Mapping[int, Tensor]]) -> tuple[int, int, int]:
    """Widths of what comes in: as queries, keys and values."""
    names = _PROJECTIONS if module._parameters["in_proj_weight"] is None else ("in_proj_weight",) * 3
    found = []
    for name in names:
        kept = keep.get(name, {}).get(1)
        found.append(module.get_parameter(name).shape[1] if kept is None else kept.numel())
    return found[0], found[1], found[2]
