"""How well a network does: accuracy, the area under the ROC curve, explained variance.

Holds: metrics of a network's outputs by name, and the pass over a part that collects these. Elsewhere: training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from apoptosis.errors import DataError, NonFiniteError
from apoptosis.model.passes import internal_passes
from apoptosis.tools.recipes.datasets.parts import MetricName, Rows
from apoptosis.tools.recipes.fitting import Loss, logits_of, numbers_of, placed_on, run_on


def accuracy(logits_NC: Tensor, labels_N: Tensor) -> float:
    """Share of rows whose largest logit is the label's, in 0..1; labels below 0 do not count."""
    right = logits_NC.argmax(1) == labels_N
    return float(right[labels_N >= 0].double().mean())


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


def r2(values: Tensor, labels: Tensor) -> float:
    """Share of the variance of the labels that predictions explain, 1 at most; the mean over several columns.

    Raises: DataError: all labels are the same. NonFiniteError: a prediction is NaN or infinite.

    Example:
        >>> r2(torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([1.0, 2.0, 3.0]))
        0.5
    """
    labels = labels.double().flatten(1) if labels.dim() > 1 else labels.double()[:, None]
    values = values.double().reshape(labels.shape)
    spread = (labels - labels.mean(0)).square().sum(0)
    if not bool((spread > 0).all()):
        raise DataError("R2 needs labels that differ.")
    if not bool(torch.isfinite(values).all()):
        raise NonFiniteError("the network's outputs hold NaN or infinity; lower the learning rate.")
    return float((1 - (values - labels).square().sum(0) / spread).mean())


METRICS: Mapping[MetricName, Callable[[Tensor, Tensor], float]] = MappingProxyType(
    {"accuracy": accuracy, "auc": auc, "r2": r2}
)


def evaluate(
    model: nn.Module,
    part: Rows,
    metric: MetricName,
    device: torch.device,
    batch: int = 512,
    loss: Loss | None = None,
) -> float:
    """Metric of `model` on a part, in evaluation mode and float32; the model is as before afterwards.

    Args:
        model: maps (rows, *shape) to logits (rows, classes), or what `part` holds to what the metric reads.
        part: at least one row.
        metric: a key of METRICS, or "negative loss", the mean loss with its sign turned.
        device: where the model lives.
        batch: rows per forward pass.
        loss: for "negative loss".
    """
    seen: list[Tensor] = []
    known: list[Tensor] = []
    total = 0.0
    with internal_passes(model):
        for inputs, own in part.slices(batch):
            output, labels = run_on(model, placed_on(inputs, device)), own.to(device)
            if metric == "negative loss":
                assert loss is not None
                total -= float(loss(output, labels)) * len(labels)
            elif metric == "accuracy" and labels.dim() > 1:  # of every pixel: logits of all would not fit
                seen.append(logits_of(output, labels).argmax(1))
                known.append(labels)
            else:
                seen.append(numbers_of(output).float())
                known.append(labels)
    if metric == "negative loss":
        return total / len(part)
    labels = torch.cat([one.flatten() for one in known] if known[0].dim() > 1 and metric == "accuracy" else known)
    if metric == "accuracy" and known[0].dim() > 1:
        picked = torch.cat([one.flatten() for one in seen])
        return float((picked == labels)[labels >= 0].double().mean())
    return METRICS[metric](torch.cat(seen), labels)
