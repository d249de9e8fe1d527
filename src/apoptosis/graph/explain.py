"""What would unpin: the remedies that belong to reasons.

Holds: one remedy for every kind of reason, and the recognition of torch's own parametrizations, pruning masks and
norm hooks. Elsewhere: remedies that name numbers of the case, which stand beside their reasons.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.nn.utils import parametrize

from apoptosis.modules.norms import SHRUNK, eps_name, is_bare, is_shrunk

# Old-style hooks that compute `weight` before each forward pass: name of the hook's type -> how to take it off.
_HOOKS = {
    "WeightNorm": "torch.nn.utils.remove_weight_norm",
    "SpectralNorm": "torch.nn.utils.remove_spectral_norm",
}
_MARK = ".parametrizations."

NORM_REMEDY = "A norm that treats every channel by itself (BatchNorm, GroupNorm with one group per channel) frees them."
OPT_IN = "norm_widths='compensated' lets go what the norm's statistics can do without."
_TAKE_OFF = (
    "Without its forward pre-hooks, or the forward that was set on the module itself, norm_widths='compensated' lets "
    "go what the norm's statistics can do without."
)
_NOT_STOCK = (
    "norm_widths='compensated' lets go what the statistics of nn.LayerNorm and nn.RMSNorm can do without; this norm is "
    "none of these{}."
)
ROWS_REMEDY = "Each of its rows (a head) is normalised by itself: whole ones may go, as a group of their own, ':heads'."
FRONT_REMEDY = "An nn.Linear or 1x1 convolution in front of it would free what lies before."
_RAW = "Contract the raw parameter (nn.Linear, nn.Conv, F.linear), or freeze what is computed into one."
_OPERAND = "Let a layer make both operands, or broadcast one value over all channels."
_WHOLE = "Use the parameter whole, through nn.Linear or nn.Conv."
_GATE = "Let a layer make as many gates as there are channels."
_MASK = "Give all heads one mask, or a table with a column for each head."
_FLAT = "Give the parameter one axis that runs along the channels, and no other."
_BESIDE = "Concatenate channels with channels alone."
_LAID = "Let the channels be the last axis of every operand."
_KEPT = "Keep what operators of torch make of the channels, or reset it before every pass."
_TIED = "Give each use a parameter of its own."

# Part of a reason -> what would unpin; the first that fits counts.
_USUAL = (
    ("reads part of the rows", _WHOLE),
    ("they share the width that", "Give each of these widths a number of its own, or read it off a tensor's shape."),
    ("network's output", "A layer behind it would free it; what the model need not return (caches) it should not."),
    ("the model returns it", "Return what is computed from it instead."),
    ("no consumer site reads", "Let a layer read these channels, or delete the layer that makes them."),
    ("is producer and consumer along the same axis", _TIED),
    ("is read elsewhere too", _TIED),
    ("share memory without being one tensor", "Make them one parameter, or give each memory of its own (clone())."),
    ("of the pass before, which has none", _KEPT),
    ("which has none", _OPERAND),
    ("values that carry no channels", _OPERAND),
    ("which carries no channels", "The width of the inputs is given; nothing is to be removed there."),
    ("beside values that are none", _BESIDE),
    ("values that are none", _BESIDE),
    ("spreads one channel over others", _GATE),
    ("positions of another channel", _GATE),
    ("mixes the positions of single channels", FRONT_REMEDY),
    ("along different axes", FRONT_REMEDY),
    ("along another axis", FRONT_REMEDY),
    ("over those of another axis", FRONT_REMEDY),
    ("several axes of it", _FLAT),
    ("left a view behind", "Write the result to a new tensor instead of in place."),
    ("forward pass on example_input", "Give an example_input whose forward pass runs it."),
    ("during the forward pass", "Change the parameter outside the forward pass."),
    ("very large tensor", "Concatenate the parts instead of writing into slices, or give a smaller example_input."),
    ("too large to be followed", "Give a smaller example_input: fewer examples or positions."),
    ("could not be followed", "Call the operator with plain arguments, or leave the group out with exclude=."),
    ("has no rule", "Register one with register_rule(), or leave it out with exclude=."),
    ("before it is used", _RAW),
    ("computed from it", _RAW),
    ("values that are not a parameter", _RAW),
    ("plain matrix", _WHOLE),
    ("does not use it whole", _WHOLE),
    ("in several ways", _TIED),
    ("and in another way", _TIED),
    ("across channels", "Give the bias one entry for each channel."),
    ("normalises", NORM_REMEDY),
    ("to the scores", _MASK),
    ("a mask of its own", _MASK),
    ("attends along an axis", _LAID),
    ("in an order that cannot be followed", _LAID),
    ("in many orders", _LAID),
    ("channels that are not inside it", _LAID),
    ("other channels than this module did before", _TIED),
    ("no stack of matrices", "Multiply with one parameter of shape (experts, out, in), or one expert at a time."),
    ("stack that is laid out", "Multiply with one parameter of shape (experts, out, in), or one expert at a time."),
    ("root of the number of channels", "Give the operator its scale as a number."),
    ("channels", FRONT_REMEDY),
)  # fmt: skip


def usual_hint(reason: str) -> str:
    """Return what usually unpins channels that are pinned for a reason like this, "" for a reason of no known kind.

    Example:
        >>> usual_hint("operator aten.mul in 'gate' spreads one channel over others")
        'Let a layer make as many gates as there are channels.'
    """
    return next((remedy for part, remedy in _USUAL if part in reason), "")


def opt_in(module: nn.Module | None) -> str:
    """Return the usual remedy for channels under this norm, with the way to let them go where there may be one."""
    stock = type(module) in SHRUNK and len(getattr(module, "normalized_shape", ())) == 1
    if module is not None and (stock or is_shrunk(module) or eps_name(module) is not None):
        return f"{NORM_REMEDY} {OPT_IN}" if is_bare(module) else f"{NORM_REMEDY} {_TAKE_OFF}"
    kind = type(module).__name__
    own = isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and type(module) not in SHRUNK
    return f"{NORM_REMEDY} {_NOT_STOCK.format(f' ({kind} has a forward pass of its own)' if own else '')}"


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
