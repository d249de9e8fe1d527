"""What would unpin a weight that something computes before each forward pass.

Lives here: recognising torch's own parametrizations, pruning masks and norm hooks on the running modules. Does not live
here: the remedies of operators, which stand beside their reasons.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.nn.utils import parametrize

# Old-style hooks that compute `weight` before each forward pass: name of the hook's type -> how to take it off.
_HOOKS = {
    "WeightNorm": "torch.nn.utils.remove_weight_norm",
    "SpectralNorm": "torch.nn.utils.remove_spectral_norm",
}
_MARK = ".parametrizations."


def layer_of(name: str) -> str:
    """Return the name of the layer that a parametrization belongs to, and any other name as it is.

    Example:
        >>> layer_of("body.0.parametrizations.weight.0"), layer_of("body.0")
        ('body.0', 'body.0')
    """
    head, mark, _ = f".{name}".partition(_MARK)
    return head[1:] if mark else name


def parametrized(running: Iterable[tuple[str, nn.Module]]) -> str:
    """Say how to take off what computes a weight in the innermost of the running modules, "" where nothing does.

    Args:
        running: (qualified name, module), the innermost one first.
    """
    for name, module in running:
        found = _taken_off(layer_of(name), module)
        if found or _MARK not in f".{name}":
            return found
    return ""


def _taken_off(name: str, module: nn.Module) -> str:
    lists = getattr(module, "parametrizations", None)
    if isinstance(lists, nn.ModuleDict) and parametrize.is_parametrized(module):
        leaf, steps = next(iter(lists.items()))
        kinds = ", ".join(type(step).__name__.strip("_") for step in steps.children())
        return f"Take the parametrization ({kinds}) off: parametrize.remove_parametrizations({name}, '{leaf}')."
    for hook in module._forward_pre_hooks.values():
        kind = type(hook).__name__
        if kind in _HOOKS:
            return f"Take it off: {_HOOKS[kind]}({name})."
        if type(hook).__module__ == "torch.nn.utils.prune":
            return f"Make the pruning final: torch.nn.utils.prune.remove({name}, 'weight')."
    return ""
