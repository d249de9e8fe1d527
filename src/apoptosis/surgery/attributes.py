"""The table of plain module attributes that must stay true to the tensors' shapes, and its extension by the user.

Holds: the one table (`ATTRIBUTES`), `register_attributes`, and what both say of one module. Elsewhere: numbers that
a forward pass splits channels by (splits.py), nn.MultiheadAttention (attention.py), any writing (transaction.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize

from apoptosis.errors import ArgumentError, ShapeError
from apoptosis.modules.attention import attention_attributes
from apoptosis.records import TensorEdit
from apoptosis.surgery.norms import norm_attributes
from apoptosis.surgery.numbers import followed_numbers
from apoptosis.surgery.splits import unflattened_of, vocabulary_of


class Row(NamedTuple):
    """An attribute that follows a tensor's dim, in proportion: of a width times four, the width follows.

    times_groups: the attribute counts the channels of all convolution groups while the dim counts those of one.
    """

    tensor: str
    dim: int
    attribute: str
    times_groups: bool = False


def _weight(*attributes: str) -> tuple[Row, ...]:
    """Return rows of attributes that follow the dims of the weight, in order."""
    return tuple(Row("weight", dim, attribute) for dim, attribute in enumerate(attributes))


ATTRIBUTES: Mapping[type[nn.Module] | str, tuple[Row, ...]] = {
    nn.Linear: _weight("out_features", "in_features"),
    nn.Bilinear: _weight("out_features", "in1_features", "in2_features"),
    _ConvNd: (Row("weight", 0, "out_channels"), Row("weight", 1, "in_channels", times_groups=True)),
    _ConvTransposeNd: (Row("weight", 0, "in_channels"), Row("weight", 1, "out_channels", times_groups=True)),
    _NormBase: (Row("weight", 0, "num_features"), Row("running_mean", 0, "num_features")),
    nn.GroupNorm: _weight("num_channels"),
    nn.LayerNorm: _weight("normalized_shape", "normalized_shape", "normalized_shape"),
    nn.RMSNorm: _weight("normalized_shape", "normalized_shape", "normalized_shape"),
    nn.PReLU: _weight("num_parameters"),
    nn.Embedding: _weight("num_embeddings", "embedding_dim"),
    nn.EmbeddingBag: _weight("num_embeddings", "embedding_dim"),
    # Rows of a recurrence hold all gates one below the other. Every layer and direction has the first one's width.
    nn.RNNBase: (
        Row("weight_ih_l0", 0, "hidden_size"),
        Row("weight_ih_l0", 1, "input_size"),
        Row("weight_hr_l0", 0, "proj_size"),
    ),
    nn.RNNCellBase: (Row("weight_ih", 0, "hidden_size"), Row("weight_ih", 1, "input_size")),
    "transformers.pytorch_utils.Conv1D": _weight("nx", "nf"),
}
"""What every known module type keeps of its widths, by the type, or by its qualified name where its package need not be
there. The first type of a module's method resolution order that is in it counts, so subclasses need no entry."""
_REGISTERED: dict[type[nn.Module] | str, tuple[Row, ...]] = {}
_NUM_GROUPS: Mapping[type[nn.Module], str] = {_ConvNd: "groups", nn.GroupNorm: "num_groups"}


def register_attributes(module_type: type[nn.Module], rows: Iterable[tuple[str, int, str]]) -> None:
    """Say which plain attributes of a module type follow the shapes of its own parameters and buffers.

    A module type needs this only if it keeps widths as attributes that its forward pass, or the user, reads. After an
    event an attribute changes in the proportion in which the dim did (of a width times four, the width follows). What a
    forward pass splits channels by (`num_heads`, `head_dim`) follows by itself; see docs/extending.md.

    Args:
        module_type: applies to the type and its subclasses, in place of the rows of its parents: name those too.
        rows: (tensor, dim, attribute): name of a parameter or buffer of the module ("scale") or of one inside it
            ("conv.weight"), its dim, and the attribute, which holds an int, or a tuple of ints of which entry `dim`
            follows. `Apoptosis` and `shrink_` refuse a name that is no tensor of a module of this type.

    Raises: ArgumentError: no module type, a malformed row, no row, or a type that has rows already.

    Example:
        >>> class Scaled(nn.Module):
        ...     def __init__(self, width):
        ...         super().__init__()
        ...         self.width, self.scale = width, nn.Parameter(torch.ones(width))
        >>> register_attributes(Scaled, [("scale", 0, "width")])
        >>> attribute_changes(Scaled(8), "scale", {0: torch.arange(3)}, (8,))
        {'width': 3}
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise ArgumentError(f"register_attributes takes a subclass of nn.Module, not {module_type!r}.")
    name = module_type.__qualname__
    if module_type in ATTRIBUTES or module_type in _REGISTERED:
        raise ArgumentError(
            f"{name} has rows already: {', '.join(row.attribute for row in rows_of_type(module_type))}."
        )
    if not isinstance(rows, Iterable):
        raise ArgumentError(f"register_attributes({name}): rows is a {type(rows).__name__}, not a sequence of rows.")
    found = []
    for row in rows:
        match row:
            case (str(tensor), int(dim), str(attribute)) if dim >= 0 and tensor and attribute:
                found.append(Row(tensor, dim, attribute))
            case _:
                raise ArgumentError(f"register_attributes({name}): {row!r} is not (tensor, dim from 0 on, attribute).")
    if not found or len(set(found)) < len(found):
        raise ArgumentError(f"register_attributes({name}): {'no rows' if not found else 'a row is there twice'}.")
    _REGISTERED[module_type] = tuple(found)


def rows_of_type(kind: type[nn.Module]) -> tuple[Row, ...]:
    """Look up a type's rows, its own or those of the nearest parent that has any."""
    tables = (_REGISTERED, ATTRIBUTES)
    keys = (key for cls in kind.__mro__ for key in (cls, f"{cls.__module__}.{cls.__qualname__}"))
    return next((table[key] for key in keys for table in tables if key in table), ())


def rows_of(module: nn.Module) -> tuple[Row, ...]:
    """Look up a module's rows; none for a type that the table lacks."""
    return rows_of_type(type(module))


def tensors_with_rows(module: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a module, and those of the modules inside it that its rows name."""
    own = {leaf: t for leaf, t in (*module._parameters.items(), *module._buffers.items()) if t is not None}
    inside = {row.tensor: _find(module, row.tensor) for row in rows_of(module) if "." in row.tensor}
    return own | _computed_from(module) | {name: tensor for name, tensor in inside.items() if tensor is not None}


def _computed_from(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters from which a parametrization or a hook computes a tensor of the module, by its leaf."""
    found: dict[str, Tensor] = {}
    lists: Any = module.parametrizations if parametrize.is_parametrized(module) else {}
    for leaf, steps in lists.items():
        own = [p for p in steps._parameters.values() if p is not None]
        found |= {leaf: max(own, key=lambda p: p.numel())} if own else {}
    for name, tensor in module._parameters.items():
        leaf = next((name.removesuffix(end) for end in ("_v", "_orig") if name.endswith(end)), "")
        if tensor is not None and leaf and leaf not in module._parameters and hasattr(module, leaf):
            found[leaf] = tensor
    return found


def _find(module: nn.Module, path: str) -> Tensor | None:
    """Return a tensor by its path. Raises: AttributeError: there is none, or it is no parameter or buffer."""
    where, _, leaf = path.rpartition(".")
    inner = module.get_submodule(where)
    held = inner._parameters if leaf in inner._parameters else inner._buffers
    if leaf not in held:
        raise AttributeError(f"'{leaf}' is no parameter or buffer")
    return held[leaf]


def check_registered(model: nn.Module) -> None:
    """Refuse rows of the user's that name a tensor or an attribute which a module of their type does not have.

    Raises: ArgumentError: with the module and the row.
    """
    for name, module in model.named_modules():
        kind = next((cls for cls in type(module).__mro__ if cls in _REGISTERED), None)
        for row in _REGISTERED[kind] if kind is not None else ():
            who = f"register_attributes({type(module).__qualname__})"
            try:
                _find(module, row.tensor)
            except AttributeError as error:
                raise ArgumentError(f"{who}: '{name}' has no parameter or buffer '{row.tensor}'.") from error
            if not hasattr(module, row.attribute):
                raise ArgumentError(f"{who}: '{name}' has no attribute '{row.attribute}'.")


def attributes_of(module: nn.Module) -> dict[str, Any]:
    """Read the attributes that follow tensor shapes: those of the table, groups, numbers of heads, sizes of a head.

    Example:
        >>> attributes_of(nn.Linear(3, 5))
        {'out_features': 5, 'in_features': 3}
    """
    found = {row.attribute: getattr(module, row.attribute) for row in rows_of(module)}
    if (name := groups_name(module)) is not None:
        found[name] = getattr(module, name)
    found |= unflattened_of(module) | followed_numbers(module)
    return {**found, **vocabulary_of(module), **attention_attributes(module), **norm_attributes(module)}


def attribute_changes(
    module: nn.Module, leaf: str, keep: Mapping[int, Tensor], old_shape: tuple[int, ...]
) -> dict[str, Any]:
    """Say what the module's attributes become when tensor `leaf` keeps these positions.

    Args:
        module: that holds the tensor.
        leaf: the tensor's name in it.
        keep: dim -> kept positions.
        old_shape: the tensor's shape before.

    Returns: attribute -> new value, for those that change.

    Raises:
        ShapeError: a grouped convolution or normalisation whose groups would have different sizes; an attribute that is
            no whole number after the event.
    """
    rows = [row for row in rows_of(module) if row.tensor == leaf]
    if not rows or not keep:
        return {}
    shape = [keep[dim].numel() if dim in keep else size for dim, size in enumerate(old_shape)]
    changes: dict[str, Any] = {}
    parts = groups_name(module)
    groups = 1 if parts is None else _kept_groups(module, parts, keep, old_shape[0])
    if parts is not None and groups != getattr(module, parts):
        changes[parts] = groups
    for _, dim, attribute, times_groups in rows:
        if dim not in keep and not (times_groups and "groups" in changes):
            continue
        old: Any = getattr(module, attribute)
        if times_groups:
            new: Any = shape[dim] * groups
        elif isinstance(old, tuple):
            new = (*old[:dim], shape[dim], *old[dim + 1 :])
        else:
            new, rest = divmod(old * shape[dim], old_shape[dim])
            if rest:
                raise ShapeError(f"{type(module).__name__}.{attribute} = {old} would no longer be a whole number.")
        if new != old:
            changes[attribute] = new
    return changes


def check_recurrence(module: nn.Module, edited: Mapping[int, TensorEdit]) -> None:
    """Refuse widths that torch's recurrent modules cannot have: all layers and directions share one hidden width.

    Args:
        module: any module; others than nn.RNN, nn.GRU and nn.LSTM are let through.
        edited: id of a tensor before the event -> its edit.

    Raises: ShapeError: layers of different widths, or a projection that is no narrower than what it projects.
    """
    if not isinstance(module, nn.RNNBase):
        return
    widths: dict[str, set[int]] = {"weight_hh": set(), "weight_hr": set()}
    for name, p in module._parameters.items():
        if p is not None and (kind := name.rpartition("_l")[0]) in widths:
            keep = edited[id(p)].keep if id(p) in edited else {}
            widths[kind].add(keep[0].numel() if 0 in keep else p.shape[0])
    who = type(module).__name__
    if any(len(found) > 1 for found in widths.values()):
        raise ShapeError(f"the layers and directions of an nn.{who} would have different widths, but share one number.")
    if widths["weight_hr"] and widths["weight_hh"] <= {4 * max(widths["weight_hr"])}:
        raise ShapeError(f"the hidden width of an nn.{who} with projections would not exceed the projected one.")


def groups_name(module: nn.Module) -> str | None:
    """Return the attribute that holds the number of a module's channel groups, None for modules without."""
    return next((name for kind, name in _NUM_GROUPS.items() if isinstance(module, kind)), None)


def _kept_groups(module: nn.Module, name: str, keep: Mapping[int, Tensor], num_rows: int) -> int:
    """Count the groups that are left: whole groups may go, and the rest may all lose equally many channels."""
    num_groups: int = getattr(module, name)
    if num_groups == 1 or 0 not in keep:
        return num_groups
    counts = torch.bincount(keep[0].cpu() // (num_rows // num_groups), minlength=num_groups)
    left = counts[counts > 0]
    if not bool((left == left[0]).all()):
        who = "convolution" if name == "groups" else "normalisation"
        raise ShapeError(f"a {who} with {num_groups} groups would be left with groups of different sizes.")
    return int(left.numel())
