"""How well a network does: accuracy, and the area under the ROC curve.

Holds: metrics of scores, and the pass over a part that collects them. Elsewhere: training.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from apoptosis.errors import DataError, NonFiniteError
from apoptosis.tools.recipes.datasets.parts import MetricName, Part


def accuracy(logits_NC: Tensor, labels_N: Tensor) -> float:
    """Share of rows whose largest logit is the label's, in 0..1."""
    return float((logits_NC.argmax(1) == labels_N).double().mean())


def auc(scores_N: Tensor, labels_N: Tensor) -> float:
    """Area under the ROC curve by the rank statistic; ties count one half.

        AUC = (sum of the ranks of the positives - n1 (n1 + 1) / 2) / (n0 n1)

    Args:
        scores_N: (rows,), larger means positive.
        labels_N: (rows,), 0 or 1, both present.

    Raises: DataError: only one class is present. NonFiniteError: a score is NaN or infinite.

    Example:
        >>> auc(torch.tensor([0.1, 0.4, 0.35, 0.8]), torch.tensor([0, 0, 1, 1]))
        0.75

    References: Hanley, McNeil, Radiology 143 (1982).
    """
    from scipy.stats import rankdata

    scores, positive = scores_N.double().numpy(force=True), labels_N.numpy(force=True) == 1
    num_positive = int(positive.sum())
    num_negative = len(positive) - num_positive
    if num_positive == 0 or num_negative == 0:
        raise DataError("the area under the ROC curve needs rows of both classes.")
    if not np.isfinite(scores).all():
        raise NonFiniteError("the network's outputs hold NaN or infinity; lower the learning rate.")
    ranks = rankdata(scores)
    return float((ranks[positive].sum() - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative))


@torch.no_grad()
def evaluate(model: nn.Module, part: Part, metric: MetricName, device: torch.device, batch: int = 512) -> float:
    """Metric of `model` on a part, in evaluation mode and float32; every module's mode is as before afterwards.

    Args:
        model: maps (rows, *shape) to logits (rows, classes).
        part: at least one row.
        metric: "accuracy", or "auc" of the difference of two logits.
        device: where the model lives.
        batch: rows per forward pass.
    """
    training = {module: module.training for module in model.modules()}
    model.eval()
    logits = []
    try:
        for start in range(0, len(part), batch):
            inputs, _ = part.between(start, min(start + batch, len(part)))
            logits.append(model(inputs.to(device)).float())
    finally:
        for module, mode in training.items():
            module.training = mode
    outputs, labels = torch.cat(logits), part.labels.to(device)
    return accuracy(outputs, labels) if metric == "accuracy" else auc(outputs[:, 1] - outputs[:, 0], labels)
