"""How well a network does: accuracy, and the area under the ROC curve.

Holds: metrics of a network's outputs by name, and the pass over a part that collects these. Elsewhere: training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from apoptosis.errors import DataError, NonFiniteError
from apoptosis.model.passes import internal_passes
from apoptosis.tools.recipes.datasets.parts import MetricName, Part


def accuracy(logits_NC: Tensor, labels_N: Tensor) -> float:
    """Share of rows whose largest logit is the label's, in 0..1."""
    return float((logits_NC.argmax(1) == labels_N).double().mean())


def auc(logits_N2: Tensor, labels_N: Tensor) -> float:
    """Area under the ROC curve of the difference of two logits, in 0..1; ties count one half.

    Raises: DataError: only one class is present. NonFiniteError: a logit is NaN or infinite.

    Example:
        >>> auc(torch.tensor([[0.0, 0.1], [0.0, 0.4], [0.0, 0.35], [0.0, 0.8]]), torch.tensor([0, 0, 1, 1]))
        0.75
    """
    from sklearn.metrics import roc_auc_score

    scores_N = (logits_N2[:, 1] - logits_N2[:, 0]).double()
    if labels_N.min() == labels_N.max():
        raise DataError("the area under the ROC curve needs rows of both classes.")
    if not bool(torch.isfinite(scores_N).all()):
        raise NonFiniteError("the network's outputs hold NaN or infinity; lower the learning rate.")
    return float(roc_auc_score(labels_N.numpy(force=True), scores_N.numpy(force=True)))


METRICS: Mapping[MetricName, Callable[[Tensor, Tensor], float]] = MappingProxyType({"accuracy": accuracy, "auc": auc})


def evaluate(model: nn.Module, part: Part, metric: MetricName, device: torch.device, batch: int = 512) -> float:
    """Metric of `model` on a part, in evaluation mode and float32; the model is as before afterwards.

    Args:
        model: maps (rows, *shape) to logits (rows, classes).
        part: at least one row.
        metric: a key of METRICS.
        device: where the model lives.
        batch: rows per forward pass.
    """
    with internal_passes(model):
        pieces = (part.between(start, min(start + batch, len(part)))[0] for start in range(0, len(part), batch))
        logits = torch.cat([model(inputs.to(device)).float() for inputs in pieces])
    return METRICS[metric](logits, part.labels.to(device))
