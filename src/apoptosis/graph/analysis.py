"""analyse(): two captures, one structure.

Holds: the order of the steps, and the notes. Elsewhere: any step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map_only

from apoptosis.distributed.wrappers import kind_in_place
from apoptosis.errors import CaptureError
from apoptosis.graph.capture import capture
from apoptosis.graph.groups.branches import with_branches
from apoptosis.graph.groups.build import build_groups
from apoptosis.graph.groups.classes import close
from apoptosis.graph.groups.copies import keep_copied
from apoptosis.graph.groups.counts import counts
from apoptosis.graph.groups.frozen import frozen_names, keep_frozen
from apoptosis.graph.groups.grids import classify_rectangular, splits
from apoptosis.graph.groups.shared_widths import with_shared_widths
from apoptosis.graph.groups.unused import pin_unreached
from apoptosis.graph.trace.carried import Carried, recall
from apoptosis.graph.trace.ids import ChannelIds, named_tensors
from apoptosis.graph.trace.partial_ops import partial_work
from apoptosis.graph.trace.result import TraceResult
from apoptosis.graph.verify.factors import scalable
from apoptosis.model.kept import known_of
from apoptosis.records import Frozen, NormWidths, Seen, Structure


def analyse(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    norm_widths: NormWidths = "pinned",
    frozen: Frozen = "keep",
) -> Structure:
    """Find the coupled channel groups of a model from one forward pass in training and one in evaluation mode.

    The model, its buffers, gradients, training flags and all random generators are afterwards as they were. What holds
    in either mode holds: channels tied in one are tied, channels pinned in one are pinned.

    Args:
        model: any module; parameters initialised.
        args: positional arguments of the forward pass (at least two examples where the model has batch normalisation).
        kwargs: its named arguments.
        norm_widths: what becomes of channels under LayerNorm and RMSNorm; "compensated": they may go, and norms are
            sites of their groups.
        frozen: what becomes of weights that require no gradient while others do; "keep": they stay as they are.

    Returns: the structure; its groups are in forward order, pinned ones included.

    Raises:
        CaptureError: the forward pass fails on this input or returns no tensor, or a parameter is not initialised yet.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
        >>> import torch
        >>> structure = analyse(net, (torch.zeros(3, 4),), {})
        >>> [(g.name, g.num_channels, g.pin.reason if g.pin else None) for g in structure.groups]
        [('0', 6, None), ('2', 2, "they are the network's output")]
    """
    tensors, aliases, _ = named_tensors(model)
    lazy = [name for name, tensor in tensors.items() if is_lazy(tensor)]
    if lazy:
        raise CaptureError(
            f"'{lazy[0]}' of {type(model).__name__} is not initialised (lazy): run the model once before."
        )
    layout = layout_of(model)
    trace, carried, returned = _followed(model, args, kwargs or {}, norm_widths)
    unread = pin_unreached(trace, model, aliases)
    close(trace)
    kept = frozen_names(model) if frozen == "keep" else frozenset()
    if frozen == "keep":
        keep_frozen(trace, model, kept)
        keep_copied(trace, model, kept)
    classes, rows = classify_rectangular(trace)
    labels = {name: tuple(classes.labels[info.axis(dim)] for dim in range(len(info.shape)))
                  for name, info in trace.channel_ids.tensors.items()}  # fmt: skip
    groups = with_shared_widths(model, trace, build_groups(trace, classes, rows), classes, labels)
    groups = with_branches(model, trace, groups, classes.labels, aliases)
    return Structure(
        groups=groups,
        macs=trace.macs.get("training", 0.0),
        shapes={name: info.shape for name, info in trace.channel_ids.tensors.items()},
        aliases=aliases,
        notes=(*trace.notes, *unread, *_one_mode(trace)),
        classes=labels,
        pinned_classes=classes.pinned,
        scalars={mode: tuple(calls) for mode, calls in trace.scalars.items()},
        splits=splits(trace, classes),
        partial_ops=partial_work(trace, groups, classes.labels, labels),
        multiples={mode: tuple(found) for mode, found in trace.multiples.items()},
        scalable=scalable(trace, classes),
        frozen=kept,
        layout=layout,
        counts=counts(trace, classes),
        kept=carried.kept(classes.labels),
        elements=sum(amount for _, mode, amount in trace.elements if mode == "training"),
        num_outputs=returned,
        trained=frozenset(trace.trained),
        buffers=frozenset(name for name, info in trace.channel_ids.tensors.items() if info.is_buffer),
    )


def _followed(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], norm_widths: NormWidths
) -> tuple[TraceResult, Carried, int]:
    """Capture the model in as many rounds as the tensors that it keeps between passes need: one for most models.

    Raises: CaptureError: the forward pass fails on this input or returns no tensor.
    """
    tensors, _, buffers = named_tensors(model)
    carried = Carried(model, args, kwargs)
    while True:
        trace = TraceResult(ChannelIds(tensors, buffers, carried.buffers), compensated=norm_widths == "compensated")
        try:
            returned = _captures(model, args, kwargs, trace, carried)
        except CaptureError as error:
            first = carried.after(error)
            if first is None:
                continue
            if not first:
                raise
            raise CaptureError(**first) from error
        if not carried.goes_on():
            break
    if not returned:
        raise CaptureError(
            f"{type(model).__name__} returns no tensor on example_input, so that nothing is known to depend on it. Let "
            "forward return what the loss is computed from."
        )
    carried.finish_round(trace, signature_of(tensors, carried.buffers))
    return trace, carried, returned


def _captures(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], trace: TraceResult, carried: Carried
) -> int:
    """Follow one pass in training and one in evaluation mode; return how many tensors they returned."""
    returned = 0
    for training in (True, False):  # on copies: a forward pass may write to its input
        fresh_args, fresh_kwargs = tree_map_only(Tensor, Tensor.clone, (args, dict(kwargs)))
        returned += capture(model, fresh_args, fresh_kwargs, trace, training=training, carried=carried)
    return returned


def signature_of(tensors: Mapping[str, Tensor], left_out: frozenset[str]) -> object:
    """Return a key of the widths of one capture."""
    return tuple((name, tuple(tensor.shape)) for name, tensor in tensors.items() if name not in left_out)


def layout_of(model: nn.Module) -> int:
    """Return a number that stands for a model's modules and for the shapes and types of its parameters.

    Where a layer is added, replaced or converted it is another one. Sharded parameters have one type at rest and may
    have another in use, so that theirs does not count.
    """
    modules = tuple((name, id(module)) for name, module in model.named_modules())
    sharded = any(kind_in_place(module) for module in model.modules())
    named = model.named_parameters(remove_duplicate=False)
    return hash((modules, tuple((name, tuple(p.shape), None if sharded else p.dtype) for name, p in named)))


def _one_mode(trace: TraceResult) -> tuple[str, ...]:
    """Say which modules take part in one mode only."""
    modes: dict[str, set[str]] = {}
    for consumer in trace.consumers.values():
        modes.setdefault(consumer.module or consumer.weight, set()).update(consumer.macs)
    return tuple(f"'{name}' takes part in {found.pop()} mode only" for name, found in modes.items() if len(found) == 1)


def replay(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    watch: Callable[[Seen], None],
    *,
    training: bool = True,
) -> None:
    """Run the model once more on inputs it has seen and show what every consumer site reads.

    Without gradients; dropout modules let everything through. The model is afterwards as it was (see `analyse`).

    Args:
        model: as in `analyse`.
        args: positional arguments; not written to.
        kwargs: named arguments; not written to.
        watch: called at every contraction with a parameter and every product of activations, in forward order.
        training: the mode of all modules but dropout.

    Raises: CaptureError: the forward pass fails on this input.
    """
    tensors, _, buffers = named_tensors(model)
    fresh_args, fresh_kwargs = tree_map_only(Tensor, Tensor.clone, (args, dict(kwargs)))
    known = known_of(model)
    left_out = frozenset() if known is None else known.buffers
    carried = recall(model, fresh_args, fresh_kwargs, signature_of(tensors, left_out))
    trace = TraceResult(ChannelIds(tensors, buffers, left_out))
    capture(model, fresh_args, fresh_kwargs, trace, training=training, carried=carried, watch=watch)
