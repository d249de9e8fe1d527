"""Consumer sites, made from the contractions that were found.

Holds: sites of weights and of products of activations. Elsewhere: which channels are one (classes.py).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from apoptosis.graph.explain import Code, Reason
from apoptosis.graph.groups.classes import Classes, own_readers
from apoptosis.graph.trace.result import NO_READER, Consumer, Product, TraceResult, pairs_of
from apoptosis.records import IntArray, LinearSite, ModuleOutput, ProductSite


def _input_columns(consumer: Consumer, columns: IntArray, num_columns: int) -> IntArray:
    if consumer.kind != "conv" or consumer.blocks == 1:
        return columns
    blocks = np.arange(consumer.blocks, dtype=np.int64) * num_columns
    return (columns[:, None, :] + blocks[None, :, None]).reshape(columns.shape[0], -1)


def _norm_of(trace: TraceResult, source: str) -> str | None:
    """Return the BatchNorm that is the only reader of a source's output (Value.source), and reads nothing else."""
    readers = trace.readers.get(source, set())
    if len(readers) != 1:
        return None
    norm = next(iter(readers))
    statistics = f"{norm}.running_mean"
    if trace.normalised.get(norm) != {source} or statistics not in trace.channel_ids.tensors:
        return None
    return norm if trace.reads[statistics] <= {norm} else None


def site_of(trace: TraceResult, consumer: Consumer, columns: IntArray) -> LinearSite:
    """Return the site of a consumer; columns: (channels, P), those that each channel owns."""
    num_columns = trace.channel_ids.tensors[consumer.weight].shape[consumer.dim]
    bias = consumer.bias
    if bias is not None and trace.reads[bias] - own_readers(consumer):
        bias = None  # it has another reader: nothing may be folded into it
    is_complex = trace.channel_ids.tensors[consumer.weight].is_complex
    return LinearSite(
        module=str(consumer.module),
        kind=consumer.kind,
        weight=consumer.weight,
        dim=consumer.dim,
        bias=None if is_complex else bias,  # offsets are real
        columns=columns,
        input_columns=_input_columns(consumer, columns, num_columns),
        num_columns=num_columns,
        taps=consumer.taps,
        zero_padded=consumer.zero_padded,
        norm=None if consumer.source is None else _norm_of(trace, consumer.source),
        dropout=consumer.dropout,
        macs=per_forward(consumer.macs) * columns.shape[1] / num_columns,
        functional=consumer.functional,
        select=consumer.select,
        conv=consumer.conv,
        factors=consumer.factors,
        normal=consumer.normal,
        is_complex=is_complex,
    )


def per_forward(macs: dict[str, float]) -> float:
    """Return multiply-adds of one forward pass: in training mode, or in evaluation where only that computes it."""
    return macs.get("training", 0.0) or macs.get("evaluation", 0.0)


@dataclass(frozen=True, slots=True)
class Products:
    """All products of a model; reader, numbers: as `TraceResult.readers_of_ids` returns them."""

    merged: list[Product]
    reader: IntArray
    numbers: dict[str, int]


def products_of(trace: TraceResult) -> Products:
    """Gather the products once for all groups."""
    return Products(_merged(trace.products.values()), *trace.readers_of_ids())


def product_sites(
    trace: TraceResult, classes: Classes, channels: IntArray, products: Products
) -> tuple[tuple[ProductSite, ...], Reason | None]:
    """Return the sites at which channels of one group are multiplied in pairs, or why that pins the group."""
    rank = np.full(int(classes.labels.max()) + 1, -1, dtype=np.int64)
    rank[channels] = np.arange(channels.size)
    found = []
    for product in products.merged:
        index = rank[classes.labels[product.left]]
        inside = np.flatnonzero(index >= 0)
        if not inside.size:
            continue
        counts = np.bincount(index[inside], minlength=channels.size)
        if bool((counts != counts[0]).any()):
            return (), Code.UNEVEN()
        order = inside[np.argsort(index[inside], kind="stable")].reshape(channels.size, -1)
        found.append(_product_site(trace, products, product, order))
    return tuple(found), None


def _merged(products: Iterable[Product]) -> list[Product]:
    """Merge the records of one product in both modes; where these differ, its channels are only sliced."""
    out: dict[str, Product] = {}
    for product in products:
        key = pairs_of(product)
        known = out.setdefault(key, product)
        if known is not product:
            fold = known.fold if known.fold == product.fold else None
            own_scale, linear = known.own_scale or product.own_scale, known.linear & product.linear
            right = known.scales_right or product.scales_right
            merged = {mode: [*known.shown[mode], *product.shown[mode]] for mode in {**known.shown, **product.shown}}
            out[key] = replace(
                known,
                fold=fold,
                own_scale=own_scale,
                linear=linear,
                scales_right=right,
                shown=defaultdict(list, merged),
            )
    return list(out.values())


def _product_site(trace: TraceResult, products: Products, product: Product, places: IntArray) -> ProductSite:
    """Return the site of a product; places: (channels, P), indices of each channel among the product's positions."""
    fold = product.fold if _foldable(trace, products, product) else None
    weight, bias, columns, num_columns = "", None, np.zeros((len(places), 0), dtype=np.int64), 0
    if fold is not None:
        weight, dim = fold
        info = trace.channel_ids.tensors[weight]
        right = _distinct(product.right[places])
        if right is not None:
            columns, num_columns = right - info.bases[dim], info.shape[dim]
            bias = next(iter(trace.bias_of.get(fold, ())), None)
        else:
            weight, fold = "", None
    rescale = []
    if product.own_scale:
        scaled = product.right if product.scales_right else product.left
        for name, dim, here in trace.channel_ids.axes_of(scaled):
            base = trace.channel_ids.tensors[name].bases[dim]
            found = _distinct(scaled[places]) if bool(here.all()) else None
            own = np.stack([np.unique(scaled[p][here[p]]) for p in places]) if found is None else found
            rescale.append((name, dim, own - base))
            rescale.extend((b, 0, own - base) for b in sorted(trace.bias_of.get((name, dim), ())))
    return ProductSite(
        module=product.module,
        weight=weight,
        dim=fold[1] if fold is not None else 0,
        bias=bias,
        columns=columns,
        input_columns=places,
        num_columns=num_columns,
        macs=per_forward(product.macs) * places.shape[1] / product.left.size,
        rescale=tuple(rescale),
        per_sum=product.left.size // product.num_rows,
        number=product.number,
        outputs=tuple(replace(one, columns=one.columns[places]) for one in _shown_by(trace, product)),
    )


def _distinct(ids: IntArray) -> IntArray | None:
    """Return the different ids of every row, ascending; None where rows have different numbers of them.

    Example:
        >>> _distinct(np.array([[4, 2, 4], [7, 7, 5]])).tolist()
        [[2, 4], [5, 7]]
    """
    ordered = np.sort(ids, axis=1)
    first = np.ones(ordered.shape, dtype=bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    counts = first.sum(axis=1)
    return ordered[first].reshape(len(ids), -1) if bool((counts == counts[:1]).all()) else None


def _shown_by(trace: TraceResult, product: Product) -> tuple[ModuleOutput, ...]:
    """Return the modules whose outputs both operands are, each time that these run, in both modes; else ()."""
    every = [outputs for found in product.shown.values() for outputs in found]
    if not every or not all(every):
        return ()
    for mode, found in product.shown.items():
        if any(trace.calls[output.module, mode] != len(found) for output in every[0]):
            return ()
    return every[0] if all(map(_alike, every, every[:1] * len(every))) else ()


def _alike(some: tuple[ModuleOutput, ...], others: tuple[ModuleOutput, ...]) -> bool:
    return all(
        (a.module, a.width) == (b.module, b.width) and np.array_equal(a.columns, b.columns)
        for a, b in zip(some, others, strict=True)
    )


def _foldable(trace: TraceResult, products: Products, product: Product) -> bool:
    """Whether the right operand's producer is read by this product only, so that its rows may be folded into."""
    if product.fold is None or len(trace.reads[product.fold[0]]) > 1:
        return False
    biases = trace.bias_of.get(product.fold, set())
    if len(biases) > 1 or any(len(trace.reads[bias]) > 1 for bias in biases):
        return False
    if np.intersect1d(product.left, product.right).size:
        return False
    ids = np.concatenate([product.left, product.right]) if product.stepwise else product.right
    readers = products.reader[ids]
    return bool(((readers == NO_READER) | (readers == products.numbers.get(pairs_of(product), -1))).all())
