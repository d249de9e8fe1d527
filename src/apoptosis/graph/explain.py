"""Why channels are never removed: reason codes, their texts, and what would change it.

Holds: one code for every kind of reason with its text and its remedy, and the recognition of torch's own
parametrizations, pruning masks and norm hooks. Elsewhere: which reason applies (rules, groups, surgery). Programs ask
for the code (`pin.code`), never for the wording.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum, unique

from torch import nn
from torch.nn.utils import parametrize

from apoptosis.modules.norms import SHRUNK, eps_name, is_shrunk, is_unhooked
from apoptosis.records import Pin

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
_NOT_STOCK = "norm_widths='compensated' lets go what the statistics of {} can do without; this norm is none of these{}."
ROWS_REMEDY = "Each of its rows (a head) is normalised by itself: whole ones may go, as a group of their own, ':heads'."
_FRONT = "An nn.Linear or 1x1 convolution in front of it would free what lies before."
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
_INDEX = "Compute the positions from something that is not removed."
_NUMBER = "Number positions along another axis than the channels."
_STRIDES = "Index or slice instead."
_PRODUCT = "Keep it out of the shrinking part with exclude=, or compute it from an nn.Linear's output."
_STACK = "Multiply with one parameter of shape (experts, out, in), or one expert at a time."
_MATRICES = "The widths inside the matrices may shrink; their number may not."
_SCORES = "Give the bias one entry for each channel."
_INPUT = "Give an example_input that takes this way, or delete it."
_LARGER = "Give a larger example_input, of which some rows come here."
_CUT = "frozen='cut' lets it shrink where nothing else needs its old shape."
NO_REMEDY = ""
"""The user asked for it, or the place that gives the reason names a remedy of the case (`Code.__call__`)."""


@dataclass(frozen=True, slots=True)
class Reason:
    """Why something is never removed: the code, one sentence, the user's line, the remedy, the operator."""

    code: Code
    text: str
    where: str = ""
    remedy: str = ""
    operator: str = ""

    def pin(self, group: str, num_channels: int) -> Pin:
        """Return the pin of a group for this reason."""
        return Pin(
            group=group,
            num_channels=num_channels,
            reason=self.text,
            where=self.where,
            remedy=self.remedy,
            code=self.code.code,
            operator=self.operator,
        )


@unique
class Code(Enum):
    """Kinds of reasons: text, with {fields} for names and numbers, and what usually changes it.

    A call fills the fields in: `Code.OVERWRITTEN(name="a.weight")`. Texts of rules go on "operator aten.mul in 'gate'".

    Example:
        >>> Code.NO_RULE.code, Code.NO_RULE().text
        ('no_rule', 'has no rule')
    """

    # fmt: off
    # what the tracer does not follow
    OWN_RULE = ("{text}", _FRONT)  # a rule of the user's (register_rule)
    NO_RULE = ("has no rule", "Register one with register_rule(), or leave it out with exclude=.")
    TOO_LARGE = ("is too large to be followed", "Give a smaller example_input: fewer examples or positions.")
    NOT_FOLLOWED = (
        "could not be followed", "Call the operator with plain arguments, or leave the group out with exclude=.")
    VIEW_LEFT = ("left a view behind that cannot be followed", "Write the result to a new tensor instead of in place.")
    WRITES_LARGE = ("writes into part of a very large tensor",
                    "Concatenate the parts instead of writing into slices, or give a smaller example_input.")
    READS_LARGE = ("reads memory that is too large to be followed", _STRIDES)
    READS_BEYOND = ("reads memory beyond its operand", _STRIDES)
    SHARED_MEMORY = ("'{one}' and '{other}' share memory without being one tensor",
                     "Make them one parameter, or give each memory of its own (clone()).")
    OVERWRITTEN = ("overwrites '{name}' during the forward pass", "Change the parameter outside the forward pass.")
    REARRANGED = ("rearranges or changes '{name}' before it is used", _RAW)
    COMPUTED_WEIGHT = ("computes with '{name}' before it is used", _RAW)

    # what the model returns and what it keeps
    OUTPUT = ("they are the network's output{which}",
              "A layer behind it would free it; drop outputs that you need not return (for example use_cache=False).")
    RETURNED_PARAMETER = ("the model returns it{which}", "Return what is computed from it instead.")
    KEPT_TWO_WAYS = (
        "'{name}' is kept between passes, and channels lie along other axes of it in one pass than in the next", _KEPT)

    # elements that meet
    MEETS_NONE = ("combines channels with {origin}, which has none", _OPERAND)
    MEETS_KEPT = ("combines channels with {origin}, which has none", _KEPT)
    MEETS_VALUES = ("combines channels with values that are none", _BESIDE)
    SPREADS = ("spreads one channel over others", _GATE)
    MEETS_POSITIONS = ("combines channels with positions of another channel", _GATE)
    CROSSES = ("combines channels that lie along different axes", _FRONT)
    SEVERAL_AS_ONE = ("uses several axes of it as one", _FLAT)
    SEVERAL_AXES = ("meets several axes of it at once", _FLAT)
    GATES_NONE = ("gates channels with values that are none",
                  "Compute both halves from layers, or leave the module out with exclude=.")

    # movements
    SPLIT_IN_MANY_ORDERS = ("splits channels that lie in many orders", _LAID)
    SPLIT_WITH_NONE = ("splits channels together with values that are none", _BESIDE)
    BESIDE_NONE = ("lays channels along one axis beside values that have none along it", _BESIDE)
    LAID_OUT_WITH_NONE = ("lays channels out beside values that are none", _BESIDE)
    PACKS = ("packs sequences whose positions are channels", _FRONT)
    DIAGONAL = ("numbers channels along a diagonal", _FRONT)
    WINDOWS = ("cuts an axis that carries channels into windows", _FRONT)
    SUMS_WINDOWS = ("adds up windows along an axis that carries channels", _FRONT)
    ADDS_NONE = ("adds values that are none to channels", _FRONT)

    # positions and indices
    INDEX = ("uses them as an index", _INDEX)
    WEIGHS_ROWS = ("weighs the rows of a table with them", _INDEX)
    LOOKED_UP = ("looks channels up by number", _NUMBER)
    TABLE_ROWS = ("looks the rows of '{name}' up by number", "Its columns may go; its rows are what the input names.")
    BY_NUMBER = ("{verb} channels by number", _NUMBER)
    BY_DATA = ("picks channels by numbers that are data", _NUMBER)
    OWN_POSITIONS = ("{verb} each channel at positions of its own", _INDEX)
    FIRST_CHANNELS = ("{verb} the first of the channels", _NUMBER)
    INTO_PART = ("writes them into a part of other channels", _NUMBER)
    PART_WRITTEN = ("writes others into a part of them", _NUMBER)
    INTO_NONE = ("writes channels into {origin}, which has none", _INDEX)
    OVER_NONE = ("writes channels over values that are none", _INDEX)
    UNKNOWN_POSITIONS = (
        "writes at positions that are not known on this device", "Inspect the network on a device that holds numbers.")
    ELEMENTS_READ = ("reads elements by their number", _FRONT)
    ELEMENTS_WRITTEN = ("writes elements by their number", _FRONT)
    MAKES_POSITIONS = ("makes positions of channels", _FRONT)
    SAMPLES = ("samples at positions that are channels", _FRONT)

    # operators that see several channels at once
    DISTANCES = ("measures distances over all channels at once", _FRONT)
    MULTIPLIES_ALL = ("multiplies all channels with one another", _FRONT)
    MULTIPLIES = ("multiplies channels with one another", _FRONT)
    COMPARES = ("compares channels with one another", _FRONT)
    ORDERS_BY_VALUE = ("orders channels by their value", _FRONT)
    DROPS_BY_VALUE = ("drops elements by their value", _FRONT)
    ORDERS = ("orders channels among themselves", _FRONT)
    TRANSFORMS = ("transforms channels into one another", _FRONT)
    SUMS = (
        "reduces over channels", "An nn.Linear with one output in its place is a weighted sum that can be folded into.")
    REDUCES = ("reduces over channels", _FRONT)
    AVERAGES = ("reduces over channels, as what normalises over channels does", NORM_REMEDY)
    NORMALISES = ("normalises over channels", _FRONT)
    NORMALISES_ALONG = ("normalises or accumulates over channels", _FRONT)
    REDUCES_WITH_NONE = ("{verb} channels and values that are none", _FRONT)
    POOLS = ("pools over an axis that carries channels", _FRONT)
    NEIGHBOURS = ("normalises over channels that are neighbours", NORM_REMEDY)

    # norms
    NORM = ("normalises over channels", NORM_REMEDY)
    GROUP_NORM = ("normalises over channels, {block} at a time",
                  "With num_groups={channels} each channel is normalised by itself, and may go.")
    NORM_WITH_NONE = ("normalises channels together with values that are none", _BESIDE)
    NORM_SHAPE = ("normalises to another shape than that of its input", NORM_REMEDY)
    NORM_AXES = ("normalises over channels that lie along several axes, or with values that are none", NORM_REMEDY)
    NORM_WEIGHT = ("normalises over channels with a weight that is not its own", NORM_REMEDY)
    NORM_TWICE = ("normalises over channels and is used several times, on other channels each", NORM_REMEDY)
    NORM_SEVERAL = (
        "a norm's statistics run over these channels together with others, or over some of them twice", NORM_REMEDY)
    ROWS_NORMALISED = ("normalises each row of it", _RAW)
    ROWS_ALONG_INPUTS = ("normalises '{name}' along the channels that it reads", NORM_REMEDY)
    ROWS_STANDARDISED = (
        "normalises each row of '{name}' over them: rows of a given size cannot take over for inputs that go",
        "A gain per output channel that is learned (as in scaled weight standardisation) frees them.")

    # contractions with a parameter
    READS_NONE = ("reads {origin}, which carries no channels",
                  "The width of the inputs is given; nothing is to be removed there.")
    READS_BESIDE_NONE = ("reads channels beside values that are none", _BESIDE)
    MIXES_POSITIONS = ("mixes the positions of single channels", _FRONT)
    PART_OF_ROWS = ("reads part of the rows of '{name}'", "Let an nn.Linear or nn.Conv module compute it.")
    LAYER_AND_OTHER = ("uses '{name}' as a layer does and in another way", _TIED)
    SEVERAL_CONVOLUTIONS = ("convolves with '{name}' in several ways", _TIED)
    NO_PARAMETER = ("contracts channels with values that are not a parameter", _RAW)
    NO_MATRIX = ("does not use it as a plain matrix", _WHOLE)
    NOT_WHOLE = ("does not use it whole", _WHOLE)
    MATRIX_NUMBERS = ("numbers matrices of a stack", _MATRICES)
    EXPERT_NUMBERS = (
        "names experts by their number", "The widths inside the experts may shrink; their number may not.")
    NO_STACK = ("multiplies with what is no stack of matrices", _STACK)
    OTHER_STACK = ("multiplies with a stack that is laid out in another way", _STACK)
    BIAS_ACROSS = ("adds it across channels", _SCORES)
    ADDED_ACROSS = ("adds a parameter across channels", _SCORES)
    SLIDES = (
        "slides over channels: without one of them its neighbours would meet others",
        "A gate from two linear layers (squeeze and excitation) in its place frees them; widths inside a block shrink.")
    BUFFER_KERNEL = ("convolves channels with the buffer '{name}', into which nothing is folded",
                     "Register it as a parameter if training changes it, or leave the group out with exclude=.")
    COMPUTED_KERNEL = ("convolves with what is computed from it", _RAW)
    COMPLEX_CONVOLUTION = ("is part of a complex convolution, which cannot be followed",
                           "Write it as convolutions of real and imaginary part, with a real weight for each.")
    DEPTHWISE = (
        "a grouped convolution reads them, in blocks of two channels: with one each it would be a depthwise one",
        "Fewer groups= in that convolution give wider blocks, of which channels may go.")

    # products of activations
    NO_LAYER = ("contracts channels with values that are not a parameter", _PRODUCT)
    MULTIPLIES_NONE = ("multiplies channels with values that are none", _PRODUCT)
    OTHER_ORDER = ("multiplies channels in an order that cannot be followed", _PRODUCT)
    OTHER_AXIS = ("spreads channels over those of another axis", _PRODUCT)
    WEIGHED = ("weighs them by channels along another axis", _PRODUCT)
    COMPLEX_PRODUCT = ("multiplies complex channels with one another",
                       "Make the product of real tensors: view_as_real() in front of it.")
    OWN_ROOT = ("divides by the root of the number of channels by itself", "Give it scale= as a number.")
    SUMS_NONE = ("sums values that carry no channels, per head", _OPERAND)
    NOT_INSIDE = ("sums channels that are not inside it", _LAID)
    ATTENDS_ALONG = ("attends along an axis that carries channels", _LAID)
    MASK_PER_HEAD = ("adds a mask of its own to every head", _MASK)
    SCORE_BIAS = ("adds it to the scores", _MASK)
    BIASED_SCORES = ("adds a parameter to the scores", _MASK)
    UNEVEN = ("some of their channels are multiplied in more places than others", _FRONT)

    # what only the whole picture shows
    NO_SITE = ("no consumer site reads these channels",
               "Let a layer read these channels, or delete the layer that makes them.")
    BOTH_ENDS = ("'{name}' is producer and consumer along the same axis", _TIED)
    SHARED_WEIGHT = ("'{name}' is the weight of '{module}' and is read elsewhere too", _TIED)
    SHARED_GAIN = ("'{name}' is the gain of rows that are normalised, and is read elsewhere too", _TIED)
    SPLIT_WITH_PINNED = ("they are split into rows together with channels that are never removed", _FRONT)
    SHARED_WIDTH = ("they share the width of '{other}' {place}, which is pinned: {cause}", NO_REMEDY)
    SHARED_NUMBER = (
        "they share the width that '{attribute}' of {holder} holds with '{other}', which is pinned: {cause}", NO_REMEDY)
    PART_OF_WIDTH = ("they fill a part of rows whose width is one number, which other channels have as well",
                     "Give these rows a number of their own, or leave their width to torch (-1).")
    COPIED_MODULE = (
        "'{name}' is followed by the {kind} copy '{copy}', which a training loop updates place by place",
        "Keep the copy outside the model and call apo.follow(copy); else frozen='cut', where nothing ties the two.")
    COPIED = (
        "'{name}' has a copy in {place}, which would keep the shape it has",
        "Keep it outside the model, where apo.follow() takes it; or frozen='cut', and make it anew after every event.")
    FROZEN = ("'{name}' requires no gradient, while other parameters are trained beside it", _CUT)
    ADAPTER = ("'{name}' belongs to an adapter of peft, whose configuration and base model hold the shape it has", _CUT)

    # what the example input does not reach
    UNREAD = ("parameter '{name}' is not read by the forward pass on example_input", _INPUT)
    NOT_RUN = ("the forward pass on example_input does not run '{module}'", _INPUT)
    NOT_RUN_TOO = ("'{name}' belongs to '{module}' too, which the forward pass on example_input does not run", _INPUT)
    BESIDE_UNREAD = ("'{name}' lies along them and is not read by the forward pass on example_input", _INPUT)
    NO_ROWS = ("'{module}' runs on no rows of example_input", _LARGER)
    SIBLING_NOT_RUN = (
        "'{module}', which may read or make them as '{sibling}' does, is not run by the forward pass on example_input",
        _LARGER)

    # what the user or an event says
    EXCLUDED = ("left out by exclude=", NO_REMEDY)
    BROKEN = ("removing channels broke the forward pass: {fault}", NO_REMEDY)
    CHANGES_OUTPUTS = ("its removals alone change the outputs by {rms:.3g} (relative rms)",
                       "Run the network in float64, or allow a tolerance above 0.")
    # fmt: on

    def __init__(self, text: str, remedy: str) -> None:
        self.text, self.remedy = text, remedy

    @property
    def code(self) -> str:
        """The name by which pins carry it: stable, unlike texts."""
        return self.name.lower()

    def __call__(self, *, where: str = "", **fields: object) -> Reason:
        """Return the reason with names and numbers filled in."""
        return Reason(self, self.text.format(**fields), where, self.remedy.format(**fields))


_OF_A_PART = frozenset(code.code for code in (Code.BROKEN, Code.SHARED_NUMBER, Code.SHARED_WIDTH, Code.PART_OF_WIDTH))


def may_go_whole(pin: Pin | None) -> bool:
    """Whether a group may lose all its channels: it has no pin, or one that holds for a part of them alone.

    Widths that the code has written out, or that are those of other groups, do not matter once nothing is left.
    """
    return pin is None or pin.code in _OF_A_PART


def reason_of(why: Code | Reason | str, remedy: str = "") -> Reason:
    """Return a reason from a code, from a text of the user's, or as it is; a remedy of the case replaces the usual."""
    reason = Code.OWN_RULE(text=why) if isinstance(why, str) else why() if isinstance(why, Code) else why
    return replace(reason, remedy=remedy) if remedy else reason


def opt_in(module: nn.Module | None) -> str:
    """Return the usual remedy for channels under this norm, with the way to let them go where there may be one."""
    stock = type(module) in SHRUNK and len(getattr(module, "normalized_shape", (0,))) == 1
    if module is not None and (stock or is_shrunk(module) or eps_name(module) is not None):
        return f"{NORM_REMEDY} {OPT_IN}" if is_unhooked(module) else f"{NORM_REMEDY} {_TAKE_OFF}"
    kind = type(module).__name__
    own = isinstance(module, tuple(SHRUNK)) and type(module) not in SHRUNK
    return f"{NORM_REMEDY} {_NOT_STOCK.format(_stock(), f' ({kind} has a forward pass of its own)' if own else '')}"


def _stock() -> str:
    return " and ".join(f"nn.{cls.__name__}" if hasattr(nn, cls.__name__) else cls.__name__ for cls in SHRUNK)


def place_of(module: str, where: str = "") -> str:
    """Return a place in words.

    Example:
        >>> place_of("gate", "net.py:7"), place_of("", "")
        (" in 'gate' (net.py:7)", '')
    """
    return (f" in '{module}'" if module else "") + (f" ({where})" if where else "")


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
