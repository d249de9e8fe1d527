"""Torch-Pruning: a network cut to so many multiply-adds by the norms of its channels.

Holds: what may be cut in which network, and the search for the ratio. Elsewhere: when that happens (methods).
Reference: Fang et al., "DepGraph", arXiv 2301.12900.
"""

from __future__ import annotations

import copy
import time
from typing import Any

from torch import nn

from benchmarks.paper.training import count_macs, first_rows

ALIGN = 8  # Torch-Pruning's round_to, the same multiple as apoptosis' own
MOST = 0.9  # of a layer's channels or heads that may go
HALVINGS = 8  # in search of the ratio at which whole heads and channels go


def layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return linear and convolutional layers by name."""
    return [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]


def prunable(model: nn.Module) -> list[nn.Module]:
    """Return the layers whose outputs may be cut: all but the last; in a transformer the inner feed-forward ones alone.

    Attention written out by hand is left alone (its widths feed reshapes of the model's own), and so is every width
    under a norm of the residual stream.
    """
    found = layers(model)
    inner = [m for n, m in found if n.endswith(("fc1", "intermediate.dense"))]
    return inner or [m for _, m in found[:-1]]


def heads(model: nn.Module) -> dict[nn.Module, int]:
    """Return the projections of attention whose heads may be cut, with their number: BERT's, which counts none."""
    found = {}
    for module in model.modules():
        if hasattr(module, "attention_head_size") and hasattr(module, "query"):
            for layer in (module.query, module.key, module.value):
                found[layer] = layer.out_features // module.attention_head_size
    return found


def prune_to(model: nn.Module, example: Any, target: int, steps: int = 100) -> float:
    """Cut `model` in place until it takes at most `target` multiply-adds; return the seconds spent on counting."""
    was = model.training
    model.eval()
    idle = _whole_heads(model, example, target) if heads(model) else _step_by_step(model, example, target, steps)
    model.train(was)
    return idle


def _step_by_step(model: nn.Module, example: Any, target: int, steps: int) -> float:
    """Cut a hundredth at a time. A layer keeps at least a tenth of the channels it has."""
    free = {id(m) for m in prunable(model)}
    pruner = _pruner(
        model,
        example,
        pruning_ratio=0.95,
        max_pruning_ratio=MOST,
        iterative_steps=steps,
        ignored_layers=[m for _, m in layers(model) if id(m) not in free],
    )
    counting = 0.0
    for _ in range(steps):
        start = time.perf_counter()
        macs = count_macs(model, first_rows(example, 1))
        counting += time.perf_counter() - start
        if macs <= target:
            break
        pruner.step()
    return counting


def _whole_heads(model: nn.Module, example: Any, target: int) -> float:
    """Cut heads and inner feed-forward channels at once, at the smallest ratio that suffices.

    In one step each: with iterative_steps a second step of pruning by heads fails (torch-pruning 1.6.1, "cannot access
    local variable 'head_thres'"). The search for the ratio is on copies, and its seconds count as counting.
    """
    start = time.perf_counter()
    low, high = 0.0, MOST
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        trial = copy.deepcopy(model)
        _cut(trial, example, middle)
        if count_macs(trial, first_rows(example, 1)) <= target:
            high = middle
        else:
            low = middle
    counting = time.perf_counter() - start
    _cut(model, example, high)
    return counting


def _cut(model: nn.Module, example: Any, ratio: float) -> None:
    numbers = heads(model)
    free = {id(m) for m in (*prunable(model), *numbers)}
    pruner = _pruner(
        model,
        example,
        pruning_ratio=ratio,
        max_pruning_ratio=MOST,
        ignored_layers=[m for _, m in layers(model) if id(m) not in free],
        num_heads=numbers,
        prune_num_heads=True,
        prune_head_dims=False,
        head_pruning_ratio=ratio,
        output_transform=lambda output: output.logits.sum(),
    )
    pruner.step()


def _pruner(model: nn.Module, example: Any, **options: Any) -> Any:
    import torch_pruning as tp

    importance = tp.importance.GroupMagnitudeImportance(p=2)
    return tp.pruner.BasePruner(model, example, importance=importance, global_pruning=True, round_to=ALIGN, **options)
