"""Whether a network was trained before: read off its norms, whose weights and statistics start as ones and zeros.

Holds: that one question. Elsewhere: what follows from it (decide.policy).
"""

from __future__ import annotations

from torch import Tensor, nn

from apoptosis.distributed.sharded import has_shards

_FROM = 0.5  # share of the norms that were trained, from which on the network was
_AWAY = 0.05  # mean distance of the weights from where they start, at which a norm was trained


def looks_pretrained(model: nn.Module) -> bool:
    """Whether most norms of a network hold other weights than they start with; False without such norms.

    A norm is a module that is called so and whose weight has one axis, all ones or all zeros at the start (LayerNorm,
    RMSNorm, BatchNorm, GroupNorm and those of other libraries). Running statistics say nothing: one pass moves them.
    Of models whose parameters are spread over processes, or have no data, nothing is said.
    """
    if has_shards(model):
        return False
    weights = [weight for module in model.modules() if (weight := _weight_of(module)) is not None]
    trained = sum(all(float((w.float() - start).abs().mean()) > _AWAY for start in (0.0, 1.0)) for w in weights)
    return bool(weights) and trained >= _FROM * len(weights)


def _weight_of(module: nn.Module) -> Tensor | None:
    """Return the weight of a norm, None of other modules."""
    weight = getattr(module, "weight", None)
    if "norm" not in type(module).__name__.lower() or not isinstance(weight, Tensor):
        return None
    whole = weight.dim() == 1 and weight.numel() > 0 and not weight.is_meta
    return weight.detach() if whole else None
