"""Observes a model on batches that are given, instead of the batches of training.

Holds: the modes it is run in, and when enough batches were read. Elsewhere: hooks and rows (observe),
whose batches these are (oneshot, attempt).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from apoptosis.distributed.ranks import Ranks
from apoptosis.errors import ArgumentError, OutOfMemoryError
from apoptosis.graph import replay
from apoptosis.interrupts import is_out_of_memory, restoring
from apoptosis.model.evaluate import Call, num_rows
from apoptosis.model.kept import run_fitted
from apoptosis.model.passes import internal_passes
from apoptosis.observe import Observer, in_both, needs_float64
from apoptosis.planner import Observations
from apoptosis.records import Group


def has_modes(model: nn.Module) -> bool:
    """Whether a norm computes something else in training: a channel may be zero in one mode only."""
    norms = (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase))
    return any(norm.track_running_stats for norm in norms)


def sample(
    model: nn.Module,
    groups: Sequence[Group],
    calls: Iterable[Call],
    *,
    tolerance: float,
    modes: int,
    seed: int,
    ranks: Ranks | None = None,
) -> tuple[Observer, Observations]:
    """Run calls of the model until every site has enough rows; at tolerance 0 all calls.

    Args:
        model: not changed by these passes.
        groups: whose sites are observed.
        calls: positional and keyword arguments of one forward pass each.
        tolerance: decides how exactly rows are multiplied.
        modes: 1 for evaluation mode alone, 2 for training mode as well (dropout lets everything through).
        seed: of the positions that are sampled.
        ranks: that pool what they observe; every one of them calls this.

    Returns: the observer of evaluation mode, which kept the largest call, and what was observed in all modes.

    Raises: ArgumentError: there are no calls, or the model fails on one; on all ranks if on any.
    """
    ranks = ranks or Ranks()
    observers = [
        Observer(
            model,
            groups,
            seed=seed,
            exact=needs_float64(tolerance),
            every=tolerance == 0,
            keep_inputs=mode == 0,
            any_mode=True,
            replay=replay,
            ranks=ranks,
        )
        for mode in range(modes)
    ]
    ranks.run_collectively(partial(_show, model, observers, calls, every=tolerance == 0))
    found: dict[tuple[str, str], Any] = {}
    for observer in observers:
        observer.pool()
        found |= {key: in_both(found.get(key), seen) for key, seen in observer.observations(last=True).items()}
    return observers[0], found


def _show(model: nn.Module, observers: Sequence[Observer], calls: Iterable[Call], *, every: bool) -> None:
    """Run calls in evaluation mode before the first observer, and in training mode before the others."""
    observer, *others = observers
    count, late = 0, frozenset[str]()
    with restoring(observer.close), internal_passes(model):
        observer.open()
        for call in calls:
            args, kwargs = _copied(call)
            if num_rows((args, kwargs)) == 0:
                raise ArgumentError("batches holds a batch without examples along dimension 0.")
            _run(model, args, kwargs, count)
            late = late if count else observer.unseen
            if late:
                late = _run_late(model, observer, late, _copied(call))
            over = [observer.end_step()]
            for other in others:
                with observer.only(frozenset()):
                    over.append(_run_in_training(model, other, _copied(call)))
            count += 1
            if all(over) and not every:
                break
    if count == 0:
        raise ArgumentError("batches is empty: at least one batch of inputs is needed.")


def _copied(call: Call) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Copy the tensors of a call, which the model may write to."""
    args, kwargs = tree_map_only(Tensor, Tensor.clone, (call[0], dict(call[1])))
    return args, kwargs


def _run_in_training(model: nn.Module, observer: Observer, call: tuple[tuple[Any, ...], dict[str, Any]]) -> bool:
    """Observe a batch in training mode and return whether that is enough; nothing if the model fails on it."""
    with restoring(observer.close), internal_passes(model, training=True):
        observer.open()
        with suppress(ArgumentError):
            _run(model, *call, 0)
        return observer.end_step()


def _run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], number: int) -> None:
    try:
        run_fitted(model, args, kwargs)
    except (MemoryError, RuntimeError, TypeError, ValueError, IndexError) as error:
        if is_out_of_memory(error):
            raise OutOfMemoryError(f"memory ran out on batch {number} of batches: {error}") from error
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ArgumentError(f"batches: the model fails on batch {number}: {line}") from error


def _run_late(
    model: nn.Module, observer: Observer, late: frozenset[str], call: tuple[tuple[Any, ...], dict[str, Any]]
) -> frozenset[str]:
    """Run a batch in training mode for modules that only run there (an auxiliary head).

    Returns: those of `late` that ran; none if the model cannot train on the batch (one example).
    """
    with internal_passes(model, training=True), observer.only(late), suppress(ArgumentError):
        _run(model, *call, 0)
    return late - observer.unseen
