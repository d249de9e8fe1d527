"""A folder that plain `from_pretrained` reads: one width for all layers, and a config that says it.

Holds: that. Elsewhere: folders that keep the widths of every layer (folders.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from apoptosis.distributed.wrappers import unwrapped
from apoptosis.errors import ApoptosisError, ArgumentError
from apoptosis.integrations.transformers.folders import built_by
from apoptosis.model.evaluate import as_call
from apoptosis.surgery.widening import resized

Shapes = dict[str, tuple[int, ...]]
_TOLERANCE = 1e-6  # relative, of the largest output


def save_plain(model: PreTrainedModel, folder: str | Path, example_input: Any, **options: Any) -> dict[str, int]:
    """Write a shrunk network so that plain `from_pretrained` reads it, without this library.

    A config has one `intermediate_size` for all layers. Layers that lost more channels than the widest get channels of
    zeros, which change no output, and the config says the widest one's width. What no number of the config can say
    (heads of BERT that lost channels) is padded to its full width where that changes nothing, else refused: leave these
    groups out of the run, `ApoptosisTrainerCallback(exclude=("*attention*",))`.

    Args:
        model: the network; it stays as it is.
        folder: where to, as for `save_pretrained`.
        example_input: what one forward pass takes; a copy with random weights has to give the same outputs on it
            before and after: padding is right for any weights, or not at all.
        options: of `save_pretrained`.

    Returns: the numbers of the config that are others now, by name.

    Raises: ArgumentError: model is no PreTrainedModel. ApoptosisError: no such config computes the same; nothing was
        written.
    """
    inner: object = unwrapped(model)
    if not isinstance(inner, PreTrainedModel):
        raise ArgumentError(f"save_plain takes a model of transformers, not a {type(inner).__name__}.")
    model = inner
    now = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    config, changed = _narrowest(model, now)
    wide: Any = type(model)(config)
    _check_names(model, now, wide.state_dict())
    with torch.random.fork_rng():  # of any weights: trained ones may hide that heads are mixed up
        _check_outputs(_at_random(model), deepcopy(wide), example_input, now)
    wide.to(dtype=model.dtype, device=model.device)
    _pad(model, wide)
    if getattr(model, "generation_config", None) is not None:
        wide.generation_config = model.generation_config
    wide.save_pretrained(folder, **options)
    return changed


def _narrowest(model: PreTrainedModel, now: Shapes) -> tuple[Any, dict[str, int]]:
    """Return the config with the smallest numbers whose network has room for what there is, and these numbers."""
    config, changed = deepcopy(model.config), {}
    built = _shapes(model, config)
    for field, full in [(n, v) for n, v in vars(config).items() if type(v) is int and v > 1]:
        sizes = {a for name, s in now.items() for a, b in zip(s, built.get(name, s), strict=False) if a < b == full}
        for size in sorted(sizes, reverse=True):
            trial = deepcopy(config)
            setattr(trial, field, size)
            shapes = _shapes(model, trial)
            if shapes != built and _fits(now, shapes):
                config, built, changed[field] = trial, shapes, size
                break
    return config, changed


def _fits(now: Shapes, shapes: Shapes) -> bool:
    return now.keys() == shapes.keys() and all(
        len(s) == len(shapes[n]) and all(a <= b for a, b in zip(s, shapes[n], strict=True)) for n, s in now.items()
    )


def _shapes(model: PreTrainedModel, config: Any) -> Shapes:
    """Return the shapes that a config builds, {} where it builds nothing."""
    built = built_by(model, config)
    return {} if built is None else {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()}


def _check_names(model: PreTrainedModel, now: Shapes, values: Mapping[str, Tensor]) -> None:
    if not _fits(now, {name: tuple(tensor.shape) for name, tensor in values.items()}):
        missing = sorted(values.keys() ^ now.keys())[:3]
        raise ApoptosisError(
            f"no config of {type(model).__name__} builds this network: emptied branches, norms that make up for lost "
            f"channels or other tensors than its class has ({', '.join(missing) or 'larger ones'}). Use "
            "save_pretrained and apoptosis.integrations.transformers.from_pretrained."
        )


def _pad(model: Any, wide: Any) -> None:
    there = wide.state_dict()
    wide.load_state_dict({name: resized(value, there[name].shape) for name, value in model.state_dict().items()})


def _at_random(model: PreTrainedModel) -> Any:
    copied: Any = deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.normal_(0, 2 / max(1, parameter.shape[-1]) ** 0.5 if parameter.dim() > 1 else 1)
    return copied


def _check_outputs(model: Any, wide: Any, example_input: Any, now: Shapes) -> None:
    """Compare two copies, in float64 and evaluation mode."""
    args, kwargs = as_call(example_input)
    wide.to(model.device)
    _pad(model, wide)
    with torch.no_grad():
        before, after = (_numbers(one.double().eval()(*args, **kwargs)) for one in (model, wide))
    worst = max((float((a - b).abs().max()) for a, b in zip(before, after, strict=True)), default=0.0)
    scale = max((float(a.abs().max()) for a in before), default=0.0)
    if not worst <= _TOLERANCE * scale:
        shapes = {name: tuple(tensor.shape) for name, tensor in wide.state_dict().items()}
        cut = [name for name, shape in now.items() if shape != shapes[name]]
        raise ApoptosisError(
            f"the network cannot be saved for plain from_pretrained: padded to what its config can say, outputs "
            f"differ by {worst:.3g} (largest output {scale:.3g}). Padded were {', '.join(cut[:6])}. Leave attention "
            "out of the run (exclude=('*attention*',)), or use save_pretrained and "
            "apoptosis.integrations.transformers.from_pretrained."
        )


def _numbers(output: Any) -> list[Tensor]:
    """Return the tensors of floats in what a model of transformers returns, caches left out."""
    values = output.values() if hasattr(output, "values") else output if isinstance(output, tuple) else (output,)
    return [value.double() for value in values if isinstance(value, Tensor) and value.is_floating_point()]
