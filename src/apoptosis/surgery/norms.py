"""What an event does to the norms that read the channels it takes.

Holds: the scale of a weight that follows the width, the edits of norms, and what they make of a module's
attributes, its class included. Elsewhere: the classes (apoptosis.modules.norms), the rows of weight and bias,
which are members of the group (build.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from apoptosis.errors import ShapeError
from apoptosis.modules.norms import (
    SHRUNK,
    NormEdit,
    ShrunkResponseNorm,
    Statistics,
    eps_name,
    gain_of,
    is_shrunk,
    is_unhooked,
    response_of,
    statistics_of,
)
from apoptosis.records import NormSite, Reduction, RowScale, SiteReduction, Structure
from apoptosis.surgery.builder import EditBuilder, check_positions, first_name


def _stays_plain(site: NormSite, reduction: SiteReduction, keep: Tensor) -> bool:
    """Whether only channels that are always zero go, of a norm that can then stay what it is."""
    gone = torch.ones(reduction.mix.shape[1], dtype=torch.bool, device="cpu")
    gone[keep.cpu()] = False
    moved = bool(reduction.mix.cpu()[:, gone].any()) or (reduction.offset is not None and bool(reduction.offset.any()))
    if site.strategy == "plain" and moved:
        raise ShapeError(f"site '{site.key}': this norm can lose channels that are always zero, and no others.")
    return site.strategy in ("plain", "either") and not moved


def add_norm(drafts: dict[str, EditBuilder], structure: Structure, site: NormSite, reduction: Reduction) -> None:
    """Scale the weight of a norm that stays what it is by sqrt(C/C'), C channels before and C' after.

    Raises: ShapeError: the norm can only lose channels that are always zero, and others would go; a weight that two
        norms share.
    """
    found, keep, num = reduction.sites[site.key], reduction.keep, len(site.columns)
    name = first_name(structure, site.weight)
    check_positions(site.columns, num, structure.shapes[name][site.dim], f"site '{site.key}'")
    if not _stays_plain(site, found, keep):
        return
    draft = drafts.setdefault(name, EditBuilder())
    if any(scale.dim == 0 for scale in draft.scales):
        raise ShapeError(f"site '{site.key}': its weight is shared, and would be scaled twice.")
    factor = math.sqrt(num / keep.numel())
    draft.scales.append(RowScale(dim=0, positions=np.arange(num, dtype=np.int64), factor=factor, follow=True))


def norm_edits(structure: Structure, reductions: Sequence[Reduction]) -> tuple[NormEdit, ...]:
    """Say what the norms of a model have to know of the reductions of one event.

    Args:
        structure: the structure that the reductions are for.
        reductions: as given to `build_edits`, which raises what is wrong with them.

    Returns: one edit per norm that loses channels.
    """
    groups = {group.name: group for group in structure.groups}
    edits = []
    for reduction in reductions:
        group = groups[reduction.group]
        for site in group.sites if reduction.keep.numel() < group.num_channels else ():
            if isinstance(site, NormSite):
                edits.append(_norm_edit(site, reduction.sites[site.key], reduction.keep))
    return tuple(edits)


def _norm_edit(site: NormSite, found: SiteReduction, keep: Tensor) -> NormEdit:
    """Put a reduction at a norm into the order of the norm's own axis."""
    place = torch.from_numpy(site.columns[:, 0])  # of each channel
    channel = torch.argsort(place)
    rows = torch.argsort(place[keep.cpu()])
    return NormEdit(
        module=site.module,
        mix=found.mix.cpu()[rows][:, channel],
        offset=None if found.offset is None else found.offset.cpu()[channel],
        plain=_stays_plain(site, found, keep),
    )


def norm_changes(module: nn.Module, edit: NormEdit) -> dict[str, Any]:
    """Say what the attributes of a norm become, its class included.

    Raises: ShapeError: a module that is no such norm, or not all that runs in its place.

    Example:
        >>> mix = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
        >>> norm = nn.LayerNorm(3)
        >>> found = norm_changes(norm, NormEdit(module="n", mix=mix, offset=None, plain=False))
        >>> found["__class__"].__name__, found["mean_weights"].tolist(), found["full_width"]
        ('ShrunkLayerNorm', [2.0, 1.0], 3)
    """
    _check_unhooked(module)
    if edit.plain:
        name = eps_name(module)
        if name is None:
            raise ShapeError(f"{type(module).__name__} is no norm that takes the root of a mean square.")
        return {name: float(getattr(module, name)) * edit.mix.shape[1] / edit.mix.shape[0]}
    layout = response_of(module)
    if layout is not None:  # of multiples it is the sizes that are added up
        found = statistics_of(module).after(edit.mix.abs(), None)
        return {**_on_device(found, module), "layout": layout, "__class__": ShrunkResponseNorm}
    if type(module) not in SHRUNK and not is_shrunk(module):
        raise ShapeError(f"{type(module).__name__} is no norm whose class can be exchanged.")
    found = statistics_of(module).after(edit.mix, edit.offset)
    return {**_on_device(found, module), "__class__": SHRUNK.get(type(module), type(module))}


def _check_unhooked(module: nn.Module) -> None:
    if not is_unhooked(module):
        raise ShapeError(
            f"a {type(module).__name__} can lose channels only where nothing but its own forward pass runs: remove "
            "its forward pre-hooks, or the forward that was set on the module itself."
        )


def _on_device(found: Statistics, module: nn.Module) -> dict[str, Any]:
    weight = gain_of(module)
    moves = weight is not None and weight.device.type != "mps"  # which has no float64
    return {
        name: value.to(weight.device) if isinstance(value, Tensor) and moves and weight is not None else value
        for name, value in found.attributes().items()
    }


def norm_attributes(module: nn.Module) -> dict[str, Any]:
    """Read what events change of a norm beside its shapes: ε, or the class and its statistics; nothing elsewhere."""
    if is_shrunk(module):
        return {"__class__": type(module).__name__, **statistics_of(module).attributes()}
    name = eps_name(module)
    return {} if name is None else {name: getattr(module, name)}


def shrunk_norm(module: nn.Module, stored: Mapping[str, Any], table: Iterable[str]) -> dict[str, Any] | None:
    """Say what makes a norm the one that was saved; None for a module or an entry of another kind.

    Args:
        module: of the model that a checkpoint is loaded into, as built or shrunk.
        stored: what `norm_attributes` said, with the attributes of the module's table.
        table: names of these attributes; all hold the width.

    Raises: ShapeError: statistics that do not fit the width, or a module whose own forward pass does not run.
    """
    layout = response_of(module) if stored.get("__class__") == ShrunkResponseNorm.__name__ else None
    cls = SHRUNK.get(type(module), type(module)) if layout is None else ShrunkResponseNorm
    known = cls is ShrunkResponseNorm or type(module) in SHRUNK or is_shrunk(module)
    if not known or stored.get("__class__") != cls.__name__:
        return None
    if layout is None and type(module) is not cls and "forward" in vars(module):
        raise ShapeError(
            f"a forward that was set on this {type(module).__name__} itself would run in place of its own."
        )
    weights, fields, sizes = stored.get("mean_weights"), set(Statistics.plain(1).attributes()), set(table)
    shape = tuple(weights.shape) if isinstance(weights, Tensor) else ()
    tensors = [value for value in stored.values() if isinstance(value, Tensor)]
    fits = len(shape) == 1 and all(stored[name] in (shape, *shape) for name in sizes & set(stored))
    if not fits or (fields | sizes) - set(stored) or [tuple(x.shape) for x in tensors] != [shape] * 3:
        raise ShapeError(f"the statistics of a {cls.__name__} over {shape} channels are damaged.")
    own = gain_of(module)
    device = torch.device("cpu") if own is None or own.device.type == "mps" else own.device
    found = {k: v.double().to(device) if isinstance(v, Tensor) else v for k, v in stored.items() if k in fields | sizes}
    return {**found, **({} if layout is None else {"layout": layout}), "__class__": cls}
