"""Network, data and loss that go together: what is read off an output, the loss, and one clear line where they do not.

Holds: the default losses, the user's own, the check before a run. Elsewhere: metrics, the training loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from apoptosis.errors import ApoptosisError, ArgumentError, DataError
from apoptosis.model.evaluate import as_call
from apoptosis.model.passes import internal_passes
from apoptosis.tools.recipes.datasets.parts import Dataset, Kind, Part
from apoptosis.tools.recipes.own import find_object, what_went_wrong

Loss = Callable[[Any, Tensor], Tensor]
IGNORED = -100  # a label that counts for nothing, as in torch


def run_on(model: nn.Module, inputs: Any) -> Any:
    """Run a model on a tensor, a tuple of arguments or a dict of keyword arguments."""
    if isinstance(inputs, Tensor):
        return model(inputs)
    args, kwargs = as_call(inputs)
    return model(*args, **kwargs)


def placed_on(inputs: Any, device: torch.device) -> Any:
    """Return inputs with all tensors on a device."""
    return inputs.to(device) if isinstance(inputs, Tensor) else tree_map_only(Tensor, lambda x: x.to(device), inputs)


def numbers_of(output: Any) -> Tensor:
    """Return the tensor that predictions are read off: the output, its `logits`, or the first tensor in it.

    Raises: DataError: there is none.

    Example:
        >>> numbers_of({"logits": torch.zeros(2, 3), "hidden": torch.ones(2, 9)}).shape
        torch.Size([2, 3])
    """
    if isinstance(output, Tensor):
        return output
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(named, Tensor):
        return named
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    if not leaves:
        raise DataError(f"the network returns a {type(output).__name__} without a tensor in it: nothing to learn from.")
    return leaves[0]


def probe_of(
    data: Dataset, start: int, stop: int, device: torch.device, *, labelled: bool = True, num_classes: int = 0
) -> Any:
    """Return validation rows on which removals are measured: inputs, with labels where these are one class each.

    Raises: DataError: a label is no class of the network; num_classes: as `check_fit` returns them.
    """
    inputs, labels = data.validation.between(start, stop)
    labelled = labelled and data.kind == "classes" and labels.dim() == 1
    if num_classes:
        check_classes(labels, num_classes)
    return placed_on((inputs, labels) if labelled else inputs, device)


def logits_of(output: Any, labels: Tensor) -> Tensor:
    """Return logits with the classes along dimension 1, where F.cross_entropy looks for them; they may be last, too."""
    found = numbers_of(output)
    first = found.dim() >= 2 and (found.shape[0], *found.shape[2:]) == tuple(labels.shape)
    return found.movedim(-1, 1) if not first and found.shape[:-1] == labels.shape and found.dim() > 2 else found


def values_of(output: Any, labels: Tensor) -> Tensor:
    """Return predicted values in the shape of the labels: (rows, 1) and (rows,) are the same."""
    return numbers_of(output).reshape(labels.shape)


def loss_of(kind: Kind, named: str | None = None) -> Loss:
    """Return the loss: cross-entropy of classes, the mean squared error of values, or the user's own.

    Args: kind: of the labels. named: package.module:loss, called as loss(output, labels); a class is made first.

    Raises: ArgumentError: it cannot be imported.
    """
    if named is None:
        if kind == "classes":
            return lambda output, labels: F.cross_entropy(logits_of(output, labels), labels)
        return lambda output, labels: F.mse_loss(values_of(output, labels), labels)
    found: Any = find_object(named)
    try:
        found = found() if isinstance(found, type) else found
    except Exception as error:  # the user's code may raise anything
        raise ArgumentError(f"--loss: '{named}' cannot be made: {what_went_wrong(error)}") from error
    if not callable(found):
        raise ArgumentError(f"--loss: '{named}' is a {type(found).__name__}, which cannot be called.")
    own: Loss = found
    return own


def check_fit(model: nn.Module, data: Dataset, loss: Loss, named: str | None, device: torch.device) -> int:
    """Try network and loss on two examples, in evaluation mode; the model is as before afterwards.

    Args: named: the user's own loss, else None.

    Returns: the classes that the network tells apart, 0 for values and where the user's own loss reads the output.

    Raises: ArgumentError: the network does not take the inputs. DataError: output and labels do not go together.
    """
    inputs, labels = data.train.between(0, 2)
    labels = labels.to(device)
    try:
        with internal_passes(model):
            output = run_on(model, placed_on(inputs, device))
    except ApoptosisError:
        raise
    except Exception as error:  # the user's code may raise anything
        raise ArgumentError(
            f"the network fails on a batch of '{data.name}': {what_went_wrong(error)}; the batch holds "
            f"{_shapes(inputs)}, labels {_shapes(labels)}{_type_hint(model, inputs)}"
        ) from error
    num_classes = 0
    if named is None:
        _check_output(output, labels, data.kind)
        if data.kind == "classes":
            num_classes = int(logits_of(output, labels).shape[1])
            check_classes(labels, num_classes)
            for part in (data.train, data.validation, data.test):
                if isinstance(part, Part):  # the others are checked batch by batch
                    check_classes(part.labels, num_classes)
    try:
        value = loss(output, labels)
    except Exception as error:  # the user's code may raise anything
        raise ArgumentError(f"the loss fails: {what_went_wrong(error)}; labels are {_shapes(labels)}") from error
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise ArgumentError(f"--loss: '{named}' returns {_shapes(value)}, not one number.")
    return num_classes


def check_classes(labels: Tensor, num_classes: int) -> None:
    """Refuse labels that are no classes of the network.

    Raises: DataError: names the label, and what to do.
    """
    if not len(labels):
        return
    low, high = int(labels.min()), int(labels.max())
    if high >= num_classes:
        raise DataError(_too_many(high, num_classes))
    if low < 0 and low != IGNORED:
        raise DataError(f"labels hold {low}: classes are whole numbers from 0 to {num_classes - 1}.")


def _too_many(high: int, num_classes: int) -> str:
    from_one = ", as if they began at 1: subtract 1 from them" if high == num_classes else ""
    return (
        f"labels hold the class {high}, and the network tells {num_classes} classes apart, 0 to {num_classes - 1}"
        f"{from_one}{', or' if from_one else ':'} give the network more outputs."
    )


def _check_output(output: Any, labels: Tensor, kind: Kind) -> None:
    """Refuse an output of which the labels cannot be learnt, or one for which the loss would be something else."""
    found = numbers_of(output)
    if kind == "values":
        if found.numel() != labels.numel():
            raise DataError(
                f"the network returns {_shapes(found)} for labels of {_shapes(labels)}: these are values (regression), "
                "as many of which have to be predicted; classes must be whole numbers; or name a --loss."
            )
        return
    logits = logits_of(output, labels)
    fits = logits.dim() >= 2 and (logits.shape[0], *logits.shape[2:]) == tuple(labels.shape)
    if not fits or logits.shape[1] < 2:
        raise DataError(
            f"the network returns {_shapes(found)} for labels of {_shapes(labels)}: these are classes (whole numbers), "
            "which need (rows, classes) with two classes or more; labels that are values must be floating-point "
            "numbers, or name a --loss."
        )


def _shapes(tree: Any) -> str:
    """Say what a batch is made of.

    Example:
        >>> _shapes({"x": torch.zeros(2, 3)}), _shapes(3)
        ('(2, 3) float32', 'a int')
    """
    found = [f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}" for x in tree_leaves(tree)
             if isinstance(x, Tensor)]  # fmt: skip
    return " and ".join(found[:4]) if found else f"a {type(tree).__name__}"


def _type_hint(model: nn.Module, inputs: Any) -> str:
    """Say that inputs and weights are of different types, if they are."""
    first = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    own = {x.dtype for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.is_floating_point()}
    if own and first not in own:
        words = [str(dtype).removeprefix("torch.") for dtype in (*own, first)]
        return f"; its weights are {words[-1]}, the inputs {words[0]}: convert them in the data set"
    return ""
