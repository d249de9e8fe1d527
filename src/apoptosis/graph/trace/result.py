"""What the captures of a model add up to, before channels are counted: ties, pins, roles and reads.

Holds: the store that rules write to (one for all captures of a model). Elsewhere: any decision about
what becomes of it (groups/build.py).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np

from apoptosis.graph.explain import Reason
from apoptosis.graph.trace.calls import CallLog
from apoptosis.graph.trace.ids import ChannelIds
from apoptosis.graph.trace.values import Axis, Multiple, Paths
from apoptosis.records import Convolution, IntArray, ModuleOutput, Normal, NormStrategy, ScalarOperands, SiteKind

NO_READER, SEVERAL_READERS = -1, -2


@dataclass(slots=True)
class Consumer:
    """One weight axis that is contracted with channels by one module; gathered over calls and captures.

    module: None when nothing can be folded there (a pin says why). functional: the module is not a plain layer with
    this weight. select: the one slice of the weight that is read. blocks: of a grouped convolution. conv: of one that
    is no stock layer's. source: what the values that it makes are known by. factors, normal: as in records.Site.
    inputs: what is known of the input at each call. macs: per capture mode.
    """

    module: str | None
    kind: SiteKind
    weight: str
    dim: int
    bias: str | None
    taps: int = 1
    zero_padded: bool = False
    blocks: int = 1
    dropout: float = 0.0
    functional: bool = False
    select: tuple[tuple[int, int], ...] = ()
    conv: Convolution | None = None
    source: str | None = None
    factors: tuple[float, float] = (1.0, 1.0)
    normal: Normal | None = None
    inputs: list[Paths] = field(default_factory=list)
    macs: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @property
    def key(self) -> tuple[str | None, str, int, tuple[tuple[int, int], ...]]:
        """The key under which calls of one consumer are gathered."""
        return self.module, self.weight, self.dim, self.select


@dataclass(slots=True)
class Product:
    """One place where channels of two activations are multiplied and summed in pairs (queries times keys).

    left, right: (positions,), the ids that meet. fold: the axis that the right ids lie on, where their producer's
    rows may take over; None where only slicing is right. own_scale: the operator divides by the root of the number of
    channels by itself. linear: producers that the left operand, or else the right, scales with. num_rows: sums that run
    side by side. sides: producers that the left and the right operand scale with as a whole. number: of the products of
    the module that would have one key. stepwise: multiplied element by element and summed after, so that both may be
    read between. scales_right: the left operand does not scale with its producers. shown: by mode, for every time that
    it ran, the outputs of modules that both operands are, rearranged (records.ModuleOutput), () where they are not.
    """

    module: str
    left: IntArray
    right: IntArray
    fold: Axis | None
    own_scale: bool
    linear: frozenset[Axis]
    num_rows: int
    sides: tuple[frozenset[Axis], frozenset[Axis]] = (frozenset(), frozenset())
    number: int = 0
    stepwise: bool = False
    scales_right: bool = False
    shown: dict[str, list[tuple[ModuleOutput, ...]]] = field(default_factory=lambda: defaultdict(list))
    macs: dict[str, float] = field(default_factory=lambda: defaultdict(float))


@dataclass(frozen=True, slots=True)
class Norm:
    """One norm over channels that may go: its module, the ids it reads in order, its weight, and its strategy.

    dim: of the weight along which the channels lie. first: they are the first axis of its input after the examples.
    """

    module: str
    ids: IntArray
    weight: str
    strategy: NormStrategy
    dim: int = 0
    first: bool = False


@dataclass(frozen=True, slots=True)
class Grid:
    """Ids (rows, columns) of an axis that `module` splits into rows, or cuts into parts, of equal length."""

    module: str
    ids: IntArray
    where: str = ""


@dataclass(slots=True)
class TraceResult:
    """What the rules found in all captures of a model. Arrays hold channel ids.

    ties: removed together. broadcast_ties: ties in which one id meets several along an axis of the other side; they
    hold for channels, not for whole heads. heads: (fresh ids, ids inside each, module). bias_of: the biases added
    to what a weight axis makes. uses: (ids, key of the site that reads them). distinct: by address, an array of ids
    and the different ones of it. ran: the modules that were called; fed: those that had any rows. compensated: channels
    under norms may go, and norms are sites. atomic_blocks: (an id of what goes as a whole, why). inner_pins: places in
    `pins` of those that hold for channels, not for whole heads. parts: as heads, of what is computed row by row (a norm
    over each head). made: by place in `pins` of an output, the axes of the producers that it is made of. joins: where
    channels of different axes meet: the first ids of both, the operator in words, the line. counts: by (modules,
    line, number, ids), the numbers of places that operators were given, with their ids. calls: by (module, mode), how
    often it ran. product_macs: the ids that
    products of two activations carry, the mode and the multiply-adds, call by call. elements: likewise the
    elements that all other operators compute. size_constraints: by token
    of what is of one size, without channels and all alike along that axis, the ids that it meets. log: which modules
    were called, and of what tensors are constant. trained: parameters that what the model returns depends on.
    """

    channel_ids: ChannelIds
    compensated: bool = False
    log: CallLog = field(default_factory=CallLog)
    trained: set[str] = field(default_factory=set)
    atomic_blocks: list[tuple[IntArray, Reason]] = field(default_factory=list)
    norms: dict[str, Norm] = field(default_factory=dict)
    ties: list[tuple[IntArray, IntArray]] = field(default_factory=list)
    pins: list[tuple[IntArray, Reason]] = field(default_factory=list)
    inner_pins: set[int] = field(default_factory=set)
    parts: list[tuple[IntArray, IntArray, str]] = field(default_factory=list)
    producers: dict[Axis, str] = field(default_factory=dict)
    listed: dict[Axis, str] = field(default_factory=dict)
    biases: set[Axis] = field(default_factory=set)
    broadcast_ties: list[tuple[IntArray, IntArray]] = field(default_factory=list)
    consumers: dict[tuple[str | None, str, int, tuple[tuple[int, int], ...]], Consumer] = field(default_factory=dict)
    products: dict[str, Product] = field(default_factory=dict)
    grids: list[Grid] = field(default_factory=list)
    grid_keys: set[tuple[str, bytes]] = field(default_factory=set)
    output_producers: dict[int, frozenset[Axis]] = field(default_factory=dict)
    joins: list[tuple[IntArray, IntArray, str, str]] = field(default_factory=list)
    counts: dict[tuple[tuple[str, ...], str, int, bytes], IntArray] = field(default_factory=dict)
    heads: list[tuple[IntArray, IntArray, str]] = field(default_factory=list)
    uses: list[tuple[IntArray, str]] = field(default_factory=list)
    bias_of: dict[Axis, set[str]] = field(default_factory=lambda: defaultdict(set))
    axis_macs: dict[Axis, dict[str, float]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(float)))
    macs: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    product_macs: list[tuple[IntArray, str, float]] = field(default_factory=list)
    elements: list[tuple[IntArray, str, float]] = field(default_factory=list)
    ran: set[str] = field(default_factory=set)
    fed: set[str] = field(default_factory=set)
    calls: dict[tuple[str, str], int] = field(default_factory=lambda: defaultdict(int))
    size_constraints: dict[object, list[IntArray]] = field(default_factory=lambda: defaultdict(list))
    reads: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    read_counts: dict[tuple[str, str], int] = field(default_factory=lambda: defaultdict(int))
    readers: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    normalised: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    operations: dict[str, list[tuple[str, str, str, IntArray]]] = field(default_factory=lambda: defaultdict(list))
    distinct: dict[int, tuple[IntArray, IntArray]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    scalars: dict[str, list[ScalarOperands]] = field(default_factory=lambda: defaultdict(list))
    multiples: dict[str, dict[Multiple, None]] = field(default_factory=lambda: defaultdict(dict))

    def tie(self, a: IntArray, b: IntArray) -> None:
        """Record that ids which meet (after broadcasting, both not 0) are removed together."""
        spread = (
            any((m == 1) != (n == 1) for m, n in zip(a.shape, b.shape, strict=False)) if a.ndim == b.ndim else False
        )
        if a.shape != b.shape:
            a, b = np.broadcast_arrays(a, b)
        a, b = a.reshape(-1), b.reshape(-1)
        both = (a != 0) & (b != 0)
        if not bool(both.all()):
            a, b = a[both], b[both]
        if a.size:
            (self.broadcast_ties if spread else self.ties).append((a, b))

    def contain(self, heads: IntArray, ids: IntArray, module: str, *, part: bool = False) -> None:
        """Record that each of these heads consists of the channels at the same place of `ids` (broadcast).

        part: the module works on every head by itself, and gives the heads no name where another does.
        """
        outer, inner = (x.reshape(-1) for x in np.broadcast_arrays(heads, ids))
        both = (outer != 0) & (inner != 0)
        if bool(both.any()):
            (self.parts if part else self.heads).append((outer[both], inner[both], module))

    def count_product(self, ids: IntArray, mode: str, macs: float) -> None:
        """Count the multiply-adds of a product of two activations, which fall with the channels of these ids."""
        self.product_macs.append((ids.reshape(-1), mode, macs))

    def readers_of_ids(self) -> tuple[IntArray, dict[str, int]]:
        """Return for every id the number of the site or product that reads it, and the number of every key of these."""
        readers = np.full(self.channel_ids.num_ids, NO_READER, dtype=np.int64)
        numbers: dict[str, int] = {}
        for ids, key in self.uses:
            number = numbers.setdefault(key, len(numbers))
            known = readers[ids]
            readers[ids] = np.where((known == NO_READER) | (known == number), number, SEVERAL_READERS)
        return readers, numbers

    def pin(self, ids: IntArray, reason: Reason, *, inner: bool = False) -> None:
        """Record that the channels of these ids are never removed; zeros are passed over.

        inner: they are not removed one by one, but may go with the whole head that they are in.
        """
        ids = ids.reshape(-1)
        ids = ids[ids != 0]
        if ids.size:
            self.inner_pins.update((len(self.pins),) if inner else ())
            self.pins.append((ids, reason))


def site_key(consumer: Consumer) -> str:
    """Key of the site (records.Site) that a consumer becomes."""
    part = "".join(f"[{dim}={index}]" for dim, index in consumer.select)
    return f"{consumer.module}:{consumer.weight}:{consumer.dim}{part}"


def pairs_of(product: Product) -> str:
    """Return a key of a set of pairs, the same whichever operand comes first."""
    sides = sorted((product.left.tobytes(), product.right.tobytes()))
    return f"{product.module}:{hash(tuple(sides))}"


def product_key(product: Product) -> str:
    """Key of the site (records.Site) that a product becomes."""
    weight, dim = product.fold or ("", 0)
    return f"{product.module}:{weight}:{dim}:product{product.number or ''}"
