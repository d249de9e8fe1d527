"""Folders that `save_pretrained` writes of a shrunk network: its widths beside its config, and how it is read again.

Holds: what config and model card say of widths, `from_pretrained`. Elsewhere: widths as a file (widths_file.py), when a
Trainer writes and reads folders (callback.py).

`PreTrainedModel.save_pretrained` is wrapped, as it has no hook: for networks that never lost a channel it does what it
did.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.utils.hub import cached_file

from apoptosis.checkpoint.tensors import shapes_of
from apoptosis.checkpoint.widths import has_shrunk, set_widths_
from apoptosis.errors import ArgumentError, CheckpointError
from apoptosis.integrations.widths_file import WIDTHS_FILE, read_widths, write_widths

_KEY = "apoptosis"  # of config.json
_MARK = "_writes_widths_of_apoptosis"
_CARD = """
## How to load this network

Its layers lost channels while it was trained, and are narrower than `config.json` says. Plain `from_pretrained` refuses
its weights; with `ignore_mismatched_sizes=True` it would silently put random weights in the place of trained ones.

```python
from apoptosis.integrations.transformers import from_pretrained  # pip install torch-apoptosis
from transformers import {name}

model = from_pretrained({name}, "this folder")
```
"""


# ---------------------------------------------------------------- writing


def wrap_saving() -> None:
    """Let `PreTrainedModel.save_pretrained` write the widths of networks that lost channels; called again, nothing."""
    name = "save_pretrained"
    original = getattr(PreTrainedModel, name)
    if not hasattr(original, _MARK):
        setattr(PreTrainedModel, name, _with_widths(original))


def _with_widths(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def save_pretrained(self: PreTrainedModel, *args: Any, **options: Any) -> Any:
        if not has_shrunk(self):
            return original(self, *args, **options)
        given, plain = signature.bind(self, *args, **options).arguments, is_plain(self)
        with _config_says(self, plain=plain):
            result = original(self, *args, **options)
        if given.get("is_main_process", True):
            write_widths(self, given["save_directory"])
            add_to_card(self, given["save_directory"], plain=plain)
        return result

    setattr(save_pretrained, _MARK, True)
    return save_pretrained


@contextmanager
def _config_says(model: PreTrainedModel, *, plain: bool) -> Iterator[None]:
    """Let config.json say that its widths are not those of the network; the config itself stays as it is.

    Args: plain: whether they are, see `is_plain`.
    """
    config = model.config
    before = vars(config).pop(_KEY, None)
    if not plain:
        name = type(model).__name__
        setattr(
            config,
            _KEY,
            {
                "widths": WIDTHS_FILE,
                "note": "Layers are narrower than this config says. Plain from_pretrained refuses the weights, and "
                "with ignore_mismatched_sizes=True silently puts random ones in their place.",
                "load": f"apoptosis.integrations.transformers.from_pretrained({name}, folder)",
            },
        )
    try:
        yield
    finally:
        vars(config).pop(_KEY, None)
        if before is not None:
            setattr(config, _KEY, before)


def is_plain(model: nn.Module) -> bool:
    """Whether the config of a network builds it as it is: then plain `from_pretrained` reads its folder."""
    built = built_by(model, model.config) if isinstance(model, PreTrainedModel) else None
    return built is not None and shapes_of(model) == shapes_of(built) and not _odd(model)


def built_by(model: PreTrainedModel, config: Any) -> PreTrainedModel | None:
    """Return the network of the model's class that a config builds, without data; None where it builds nothing."""
    try:
        with torch.device("meta"):
            return type(model)(deepcopy(config))
    except Exception:  # noqa: BLE001 - code of any model, for numbers that may not go together
        return None


def _odd(model: nn.Module) -> bool:
    """Whether modules compute otherwise than their classes say: norms and branches that something was taken from."""
    names = {type(module).__module__.split(".")[0] for module in model.modules()}
    return "apoptosis" in names


def add_to_card(model: nn.Module, folder: str | Path, *, plain: bool) -> None:
    """Say in the model card how the folder is loaded, unless it says so.

    Args: plain: whether plain `from_pretrained` loads it, see `is_plain`: nothing is said then.
    """
    path = Path(folder) / "README.md"
    if isinstance(model, PreTrainedModel) and not plain:
        card = path.read_text(encoding="utf-8") if path.is_file() else ""
        if "apoptosis.integrations" not in card:
            path.write_text(card + _CARD.format(name=type(model).__name__), encoding="utf-8")


# ---------------------------------------------------------------- reading


def from_pretrained(kind: Any, folder: str | Path, **options: Any) -> Any:
    """Read a folder, or a repository of the hub, that `save_pretrained` wrote of a shrunk network.

    Args:
        kind: a class of transformers: `AutoModelForSequenceClassification`, `BertModel`, ...
        folder: what `kind.from_pretrained` takes; without widths in it, it is read as ever.
        options: what else `kind.from_pretrained` takes (dtype, device_map, revision, ...), but for
            `ignore_mismatched_sizes`: nothing that does not fit is passed over.

    Returns: the network, in evaluation mode.

    Raises: ArgumentError: kind is no class with `from_pretrained`, or ignore_mismatched_sizes is given.
        CheckpointError: the widths are damaged, or of another network.
    """
    if not callable(getattr(kind, "from_pretrained", None)):
        raise ArgumentError(f"from_pretrained takes a class of transformers first, such as BertModel, not {kind!r}.")
    if options.get("ignore_mismatched_sizes"):
        raise ArgumentError("ignore_mismatched_sizes=True would load random weights; widths are read off the folder.")
    found = ("revision", "token", "cache_dir", "subfolder", "local_files_only", "force_download", "proxies")
    where = {name: options[name] for name in found if name in options}
    path = cached_file(folder, WIDTHS_FILE, **where, **dict.fromkeys(_QUIET, False))
    if path is None:
        return kind.from_pretrained(folder, **options)
    widths = read_widths(Path(path).parent)
    if widths is None:
        raise CheckpointError(f"'{path}' is gone.")
    config = options.get("config")
    if config is None:
        code = {"trust_remote_code": options["trust_remote_code"]} if "trust_remote_code" in options else {}
        config = AutoConfig.from_pretrained(folder, **where, **code)
    wide = _class_of(kind, config)
    model = _narrowed(wide, widths).from_pretrained(folder, **options)
    for loaded in model if isinstance(model, tuple) else (model,):  # with output_loading_info there are two
        if isinstance(loaded, nn.Module):
            loaded.__class__ = wide
            vars(loaded.config).pop(_KEY, None)
    return model


_QUIET = (
    "_raise_exceptions_for_gated_repo",
    "_raise_exceptions_for_missing_entries",
    "_raise_exceptions_for_connection_errors",
)


def _class_of(kind: Any, config: Any) -> Any:
    """Return the class that an Auto class makes of a config; other classes are what they are."""
    mapping = getattr(kind, "_model_mapping", None)
    if mapping is None:
        return kind
    if type(config) not in mapping:
        raise ArgumentError(f"{kind.__name__} has no class for a {type(config).__name__}: name the class itself.")
    found = mapping[type(config)]
    if not isinstance(found, tuple | list):
        return found
    wanted = set(getattr(config, "architectures", None) or ())
    return next((one for one in found if one.__name__ in wanted), found[0])


def _narrowed(wide: Any, widths: Mapping[str, Any]) -> Any:
    """Return a class that builds the network narrow, so that transformers' own reading finds every tensor to fit."""

    def __init__(self: Any, *args: Any, **options: Any) -> None:
        wide.__init__(self, *args, **options)
        set_widths_(self, widths)

    return type(wide.__name__, (wide,), {"__init__": __init__, "__module__": wide.__module__})
