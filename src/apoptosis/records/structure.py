"""What one capture of a model found: groups of channels, the sites that read them, and what pins them.

Names of parameters, buffers and modules are qualified names in the user's model; a tied tensor goes by its first name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from apoptosis.records.branch import Branch
from apoptosis.records.calls import Count, Follow, IntArray, Kept, PartialOp, ScalarOperands, Split
from apoptosis.records.outputs import ModuleOutput

FloatArray = npt.NDArray[np.float64]

SiteKind = Literal["linear", "conv", "conv_transpose"]
NormStrategy = Literal["", "class", "plain", "either", "response"]
NormWidths = Literal["pinned", "compensated"]
Frozen = Literal["keep", "cut"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """Why channels cannot be pruned.

    reason: one sentence that names the operator. where: "file.py:line" of the user's code, where known. remedy: what
    would change it, "" for nothing. code: the kind of reason, for programs (graph.explain.Code lists them; "" in files
    of earlier versions); sentences may change from version to version, codes do not. operator: "aten.mul", "" for none.
    cause: code of the pin of another group that this one follows from, "" for none.
    """

    group: str
    num_channels: int
    reason: str
    where: str = ""
    remedy: str = ""
    code: str = ""
    operator: str = ""
    cause: str = ""

    def __str__(self) -> str:
        place = f" ({self.where})" if self.where else ""
        remedy = f" {self.remedy}" if self.remedy else ""
        return f"'{self.group}' ({self.num_channels} channels): {self.reason}{place}.{remedy}"

    def _repr_html_(self) -> str:
        from apoptosis.display import html

        rows = [("channels", f"{self.num_channels:,}"), ("why", self.reason), ("where", self.where)]
        rows += [("remedy", self.remedy), ("code", self.code)]
        return html.card(f"Group {self.group} cannot be pruned", html.table(("", ""), [row for row in rows if row[1]]))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Member:
    """One tensor axis that loses positions when a channel of the group is removed.

    positions: (channels, m): for every channel of the group, the m positions it owns along `dim` of `tensor`.
    role: "producer" for the weight whose rows make the channel, "bias" for that weight's bias,
        "channelwise" for what is applied channel by channel (weights and buffers of norms, PReLU slopes, layer scales).
    macs: multiply-adds per forward pass of the example input that one channel costs here (producers only).
    """

    tensor: str
    dim: int
    positions: IntArray
    role: Literal["producer", "bias", "channelwise"]
    is_buffer: bool = False
    macs: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Convolution:
    """The arguments of torch.convolution, for a convolution that no layer of torch.nn calls.

    axes: for every axis of the operator's weight, the axis of the parameter that becomes it; -1: none, size 1.
    padded: the padding applied to the module's input before, (sizes as torch.nn.functional.pad takes them, mode) each,
        in order.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int
    axes: tuple[int, ...]
    padded: tuple[tuple[tuple[int, ...], str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Normal:
    """A weight whose rows are normalised before use: row o is read as scale[o] * (row o, less its mean if `centred`).

    gain, gain_dim: the parameter with one factor per row that the normalised rows are multiplied by, and its axis.
    scale, length: (out,) float64 at capture; length: the norm of what scale multiplies.
    """

    gain: str
    gain_dim: int
    centred: bool
    scale: FloatArray
    length: FloatArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Site:
    """A consumer site: what reads the group's channels. This is what all kinds have; each kind is a class below.

    module: qualified name of the module that reads them (also when it is called several times: inputs pool).
    weight, dim: the tensor that is cut with the channels, and the axis along which they lie.
    columns: (channels, P), the positions that each channel owns along that axis.
    input_columns: (channels, P), the positions that each channel owns along the channel axis of what is *read*.
    num_columns: size of that axis (all groups and pinned inputs together).
    dropout: p of a dropout that feeds the site with nothing but data movement between; 0.0 for none.
    macs: multiply-adds per forward pass of the example input that one channel costs here.
    """

    module: str
    weight: str
    dim: int
    columns: IntArray
    input_columns: IntArray
    num_columns: int
    dropout: float = 0.0
    macs: float = 0.0

    @property
    def key(self) -> str:
        """Name of the site within a structure: module, weight and contracted axis; written to checkpoints."""
        return f"{self.module}:{self.weight}:{self.dim}"

    @property
    def kind(self) -> str:
        """The kind in a word, for reports; code asks for the class."""
        return "site"

    @property
    def functional(self) -> bool:
        """Whether no hook on a module can observe what is read, so that the model is run again (graph.replay)."""
        return False

    @property
    def channels_first(self) -> bool:
        """Whether channels are the first axis of the input after the examples, not the last."""
        return False

    @property
    def reads_positions(self) -> bool:
        """Whether one output reads several positions of a channel, so that moments of channels do not suffice."""
        return False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LinearSite(Site):
    """A linear layer or convolution, y = W z + b; errors fold into `weight` and `bias`.

    module: the nn.Linear or convolution; where no module's own weight is read whole (`functional`), the one whose
        forward pass computes it.
    dim: the contracted axis of the weight; columns: P > 1 after a flatten, with grouped convolutions, or when a channel
        is concatenated twice.
    input_columns: along the channel axis of the module's input (-1 for linear, 1 for convolutions). Equal to `columns`
        except for grouped convolutions, whose weight has in_channels / groups columns while the input has in_channels.
    taps: how many input positions one output reads per column (1 for linear and 1x1, kh*kw for a kernel).
    zero_padded: the convolution pads with zeros, so a constant offset cannot be folded exactly at the borders.
    norm: qualified name of a BatchNorm module that alone reads the site's output, directly; else None.
    functional: no module has the channels as its input, and no module's own weight is read whole (F.linear on a
        parameter, a recurrence, packed projections). Of kind "linear", weight.movedim(dim, -1) has out * (...) rows,
        each a plain linear map.
    select: (dim, index) pairs: only this slice of the weight is read (one expert of a stack); () for all of it.
    conv: how the operator convolves, where it is not a stock layer's forward pass that calls it; else None.
    factors: plain numbers that weight and bias are multiplied by before the operator reads them.
    normal: how the weight's rows are normalised before the operator reads them, else None.
    is_complex: the weight is, and what it reads. Mixes are real and fit real and imaginary parts alike; nothing takes
        an offset, and errors are measured on whole inputs.
    """

    kind: SiteKind
    bias: str | None = None
    taps: int = 1
    zero_padded: bool = False
    norm: str | None = None
    functional: bool = False
    select: tuple[tuple[int, int], ...] = ()
    conv: Convolution | None = None
    factors: tuple[float, float] = (1.0, 1.0)
    normal: Normal | None = None
    is_complex: bool = False

    @property
    def key(self) -> str:
        """Name of the site within a structure, with the slice that it reads."""
        return f"{self.module}:{self.weight}:{self.dim}" + "".join(f"[{dim}={index}]" for dim, index in self.select)

    @property
    def channels_first(self) -> bool:
        """Whether it convolves."""
        return self.kind != "linear"

    @property
    def reads_positions(self) -> bool:
        """Whether there are several taps or columns."""
        return self.taps > 1 or self.columns.shape[1] > 1 or self.input_columns.shape[1] > 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ProductSite(Site):
    """A sum over paired channels, y = sum over channels of left * right (queries times keys).

    It is on its own for every row of `Group.rows`. The group's channels are the pairs; the reduction explains the left
    operand, and the fold goes into `weight` (and `bias`), the producer of the right operand, whose rows take over:
    `dim` is its output axis, `columns` the rows of each pair. weight is "" where something lies between that producer
    and the product (a rotation, a norm): channels can only be dropped there.

    number: of the products that would have one key: a module may multiply the channels of queries more than once.
    per_sum: positions that one sum runs over: position p of `input_columns` belongs to sum p // per_sum. 0: each of a
        channel's P positions is in a sum of its own, one sum for all channels of a row.
    rescale: (tensor, dim, positions) of the left operand's producer and its bias, positions (channels, m), where the
        operator divides by the square root of the number of channels per row by itself: an event which keeps k' of k
        per row multiplies these by sqrt(k'/k). () where it does not.
    outputs: of the left and the right operand, where these are outputs of modules, rearranged; columns: (channels, P)
        as `input_columns`. () where only a second pass shows them.
    """

    bias: str | None = None
    number: int = 0
    per_sum: int = 0
    rescale: tuple[tuple[str, int, IntArray], ...] = ()
    outputs: tuple[ModuleOutput, ...] = ()

    @property
    def key(self) -> str:
        """Name of the site within a structure, with the number of the product."""
        return f"{self.module}:{self.weight}:{self.dim}:product{self.number or ''}"

    @property
    def kind(self) -> str:
        """The kind in a word."""
        return "product"

    @property
    def functional(self) -> bool:
        """Always: no module has both operands as its input."""
        return True

    @property
    def reads_positions(self) -> bool:
        """Always: a sum is known by all of its positions."""
        return True


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NormSite(Site):
    """A norm over the group's channels, whose statistics have to stay as they are. weight: its gain.

    strategy: "class": the module becomes one that knows what was removed; "plain": it stays as it is, and only channels
        that are always zero can be removed; "either"; "response": as "class", of a global response norm.
    channels_first: the channels are the first axis of its input after the examples, not the last.
    """

    strategy: NormStrategy
    channels_first: bool = False

    @property
    def key(self) -> str:
        """Name of the site within a structure, marked as a norm."""
        return f"{self.module}:{self.weight}:{self.dim}:norm"

    @property
    def kind(self) -> str:
        """The kind in a word."""
        return "norm"


@dataclass(frozen=True, slots=True, kw_only=True)
class Neuron:
    """How every channel of a group is computed, where that is one formula: z = φ(norm(w·x + b)).

    activation: "identity", "relu", "tanh", ... (names of numerics.activations); args: its scalar arguments.
    slopes: qualified name of a PReLU weight. max_pool: a max-pooling lies between φ and a consumer site.
    """

    weight: str
    dim: int
    bias: str | None
    norm: str | None
    activation: str
    args: tuple[float, ...] = ()
    slopes: str | None = None
    max_pool: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Group:
    """A coupled channel group: `num_channels` channels that are removed together from all members and sites.

    name: qualified name of the module that owns the first producer (with ":dim" or "#k" appended only if needed to be
        unique).
    pin: why the group cannot shrink, None if it can; groups without any site are pinned with that reason.
    rows: number of rows of equal length (heads, halves of a split) that the channels form, in order: channel c is in
        row c // (num_channels // rows). An event keeps equally many of every row.
    conflicts_with: names of groups that share channels with this one (whole heads, and the channels inside them): an
        event changes one of them only; () for most.
    tied_groups: names of groups that keep the same share of their channels as this one, because one number of the model
        is the width of a row of all of them (the head size of queries and of values); () for most.
    min_channels: the smallest width: a grouped convolution with one channel per block would be a depthwise one, whose
        outputs are grouped in another way.
    num_static: channels that lie beside the group's in every row of that width and are never removed (those that a
        partial rotation turns); the share that is kept counts both.
    branch: the residual branch that may be emptied with it, None if there is none; unbranched: then why, "" where
        nothing was asked.
    product_macs: multiply-adds per forward pass of the example input that one channel costs in products of two
        activations (queries times keys, probabilities times values).
    elements: numbers per forward pass of the example input that operators other than contractions compute per channel
        (of activations, norms, additions; what only moves data is not counted).
    """

    name: str
    num_channels: int
    members: tuple[Member, ...]
    sites: tuple[Site, ...]
    neuron: Neuron | None = None
    pin: Pin | None = None
    rows: int = 1
    conflicts_with: tuple[str, ...] = ()
    tied_groups: tuple[str, ...] = ()
    min_channels: int = 1
    num_static: int = 0
    branch: Branch | None = None
    unbranched: str = ""
    product_macs: float = 0.0
    elements: float = 0.0

    def _facts(self) -> list[tuple[str, str]]:
        """Return what a user asks of a group first, as (what, words)."""
        made = dict.fromkeys(m.tensor for m in self.members if m.role == "producer")
        facts = [("made by", ", ".join(made)), ("read by", ", ".join(dict.fromkeys(s.module for s in self.sites)))]
        facts.append(("rows of equal length", f"{self.rows:,}" if self.rows > 1 else ""))
        facts += [("keeps the share of", ", ".join(self.tied_groups)), ("instead of", ", ".join(self.conflicts_with))]
        facts.append(("cannot be pruned", "" if self.pin is None else f"{self.pin.reason}. {self.pin.remedy}".strip()))
        return [(what, words) for what, words in facts if words]

    def __repr__(self) -> str:
        pinned = "" if self.pin is None else f", pin={self.pin.code or self.pin.reason!r}"
        sites = f"{len(self.sites)} site{'s' * (len(self.sites) != 1)}"
        return f"<Group '{self.name}': {self.num_channels:,} channels, {sites}{pinned}>"

    def __str__(self) -> str:
        """Return the group's channels, what makes and reads them, and what keeps them."""
        facts = "".join(f"; {what} {words}" for what, words in self._facts())
        return f"{self.name}: {self.num_channels:,} channels{facts}"

    def _repr_html_(self) -> str:
        from apoptosis.display import html

        channels = ("channels", f"{self.num_channels:,}")
        return html.card(f"Group {self.name}", html.table(("", ""), [channels, *self._facts()]))

    @property
    def under_norm(self) -> bool:
        """Whether a norm takes its statistics of the channels."""
        return any(isinstance(site, NormSite) for site in self.sites)

    @property
    def macs_per_channel(self) -> float:
        """Multiply-adds per forward pass of the example input that one channel costs, producers and sites."""
        return sum(m.macs for m in self.members) + sum(s.macs for s in self.sites)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Structure:
    """What one capture of the model found.

    groups: all groups, pinned ones included, in forward order. macs: multiply-adds of one forward pass on the example
    input. shapes: shape of every parameter and buffer at capture. aliases: tied name -> first name.
    classes: for every parameter and buffer, per dim, the number of the channel that owns each position: what verify()
    compares. pinned_classes: the numbers that are pinned. scalars: per mode, the plain numbers that the arithmetic of
    the forward pass used, call by call. multiples: per mode, what is read times such numbers: (what, (call, place,
    power) each). scalable: per product of activations, the (tensor, dim, positions) that scale its sums alone.
    frozen: parameters that require no gradient while others do, and are therefore not changed. layout: a hash of the
    modules and of the shapes and types of parameters at capture.
    buffers: which of `shapes` are buffers. elements: as Group.elements, of all operators, without channels too.
    counts: the numbers of places that operators were given. follows: numbers of modules that were found to be widths.
    kept: tensors that the model keeps in attributes between passes, and where channels lie in them.
    refused: residual branches that were tried and cannot be emptied, by name, with the reason.
    num_outputs: tensors that the model returns, in both modes together. trained: parameters that these depend on.
    """

    groups: tuple[Group, ...]
    macs: float
    shapes: Mapping[str, tuple[int, ...]]
    aliases: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    classes: Mapping[str, tuple[IntArray, ...]] = field(default_factory=dict)
    pinned_classes: IntArray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    scalars: Mapping[str, tuple[ScalarOperands, ...]] = field(default_factory=dict)
    splits: tuple[Split, ...] = ()
    partial_ops: Mapping[str, tuple[PartialOp, ...]] = field(default_factory=dict)
    multiples: Mapping[str, tuple[tuple[str, tuple[tuple[int, int, float], ...]], ...]] = field(default_factory=dict)
    scalable: Mapping[str, tuple[tuple[str, int, IntArray], ...]] = field(default_factory=dict)
    frozen: frozenset[str] = frozenset()
    layout: int = 0
    counts: tuple[Count, ...] = ()
    follows: tuple[Follow, ...] = ()
    kept: tuple[Kept, ...] = ()
    buffers: frozenset[str] = frozenset()
    elements: float = 0.0
    refused: Mapping[str, str] = field(default_factory=dict)
    num_outputs: int = 0
    trained: frozenset[str] = frozenset()

    @property
    def open_groups(self) -> tuple[Group, ...]:
        """Groups without a pin, in forward order."""
        return tuple(group for group in self.groups if group.pin is None)

    @property
    def normalised(self) -> dict[str, tuple[LinearSite, Normal]]:
        """By key, the sites whose weight has rows that are normalised before use."""
        sites = (site for group in self.groups for site in group.sites if isinstance(site, LinearSite))
        return {site.key: (site, site.normal) for site in sites if site.normal is not None}
