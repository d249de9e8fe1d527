"""shrink_: one surgery on a trained network.

Lives here: observing on batches that the user hands over, then one transaction. Does not live here: a schedule.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from apoptosis.arguments import check_exclude, check_model, check_numbers, check_optimizers_given, check_others
from apoptosis.criteria import get_criterion
from apoptosis.errors import ArgumentError
from apoptosis.graph import replay
from apoptosis.ledger import Event
from apoptosis.observe import Observer, in_both
from apoptosis.operate import Outcome, Patient, exclude_pins, new_pins, operate, with_pins
from apoptosis.planner import Observations, Plan, Request, make_plan
from apoptosis.probe import as_call, as_probe, make_probe, num_rows, without_trace
from apoptosis.records import Certificate, NormWidths, Pin, Structure
from apoptosis.rehearsal import rehearse
from apoptosis.surgery import check_optimizers
from apoptosis.told import make_event, size_of
from apoptosis.trials import looked_at
from apoptosis.unwrap import check_alone
from apoptosis.verdict import Verdict, sanity_limit

_TRIES = 6  # halvings of the tolerance before a surgery beyond the sanity limit is given up


def shrink_(
    model: nn.Module,
    example_input: Any,
    batches: Iterable[Any],
    *,
    tolerance: float,
    criterion: str = "interpolative",
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    probe: Any = None,
    align: int = 1,
    exclude: Iterable[str] = (),
    norm_widths: NormWidths = "pinned",
    seed: int = 0,
) -> Event:
    """Remove redundant channels from a trained network, once, in place.

    Args:
        model: the network; batches are run through it in evaluation mode, which leaves no trace.
        example_input: a tensor, a tuple of arguments or a dict of keyword arguments.
        batches: each of the form of example_input; read until every site has seen enough. One suffices, but a width
            is only trusted when there were three rows for every channel kept.
        tolerance: cap per consumer site on the relative rms change of its output, 0 for what is redundant to
            round-off.
        criterion: as in Apoptosis.
        optimizer: one or several whose state follows; None if the network is not trained any more. With one, what goes
            at tolerance 0 under batch normalisation is redundant in training mode, too.
        probe: held-out inputs, or (inputs, labels). None: the change is measured on the largest batch.
        align: widths are rounded up to a multiple of this.
        exclude: names or wildcards of groups to leave alone.
        norm_widths: as in Apoptosis.
        seed: of the private random generator.

    Returns: the Event; falsy when nothing could go, with the reasons in its notes.

    Raises: ArgumentError, CaptureError, UnsupportedOptimizerError, NonFiniteError: model and optimizer are untouched.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> _ = net[0].weight.data[4:].copy_(net[0].weight.data[:4]), net[0].bias.data[4:].copy_(net[0].bias.data[:4])
        >>> event = shrink_(net, torch.zeros(2, 4), [torch.randn(512, 4)], tolerance=1e-3)
        >>> event.groups
        {'0': (8, 4)}
    """
    start = time.perf_counter()
    model, parallel = check_alone(check_model(model))
    optimizers = check_optimizers_given(optimizer)
    given, align, _, _ = check_numbers(tolerance=tolerance, align=align)
    seed, _ = check_others(criterion, seed, norm_widths=norm_widths)
    _check_batches(batches)
    if given is None:
        raise ArgumentError("tolerance=None: shrink_ has no schedule, so give a number.")
    chosen = get_criterion(criterion)
    check_optimizers(optimizers, model)
    call = as_call(example_input)
    patient = Patient(model=model, optimizers=optimizers, call=call, parallel=parallel, norm_widths=norm_widths)
    held_out = None if probe is None else make_probe(probe, example_input)
    captured = patient.capture()
    held_out = looked_at(model, held_out, call, None, remedy="Give a probe= on whose inputs it returns some.")
    verdict = Verdict(None, held_out, sanity=sanity_limit(model, tolerance))
    structure = rehearse(patient, captured, left_out := exclude_pins(captured, check_exclude(exclude)), align)
    modes = 2 if tolerance == 0 and optimizers and _has_modes(model) else 1
    observer, observations = _observe(model, structure, example_input, batches, tolerance == 0, modes, seed)
    before = size_of(patient, structure)
    notes, used = [str(pin) for pin in new_pins(with_pins(captured, left_out), structure)], given
    for _ in range(_TRIES if used > 0.0 else 1 + len(structure.groups)):
        request = Request(criterion=chosen, tolerance=used, align=align, max_drop=1.0, seed=seed)
        plan = make_plan(model, structure, observations, request)
        outcome, certificates = _surgery(patient, structure, plan, verdict, observer)
        if outcome.committed or not plan.reductions or outcome.change is None:
            break
        notes.append(f"rolled back at tolerance {used:g}: {outcome.refused}")
        stay = _at_fault(patient, structure, plan, verdict, observer) if used == 0.0 else {}  # nothing is half of 0
        structure, used = with_pins(outcome.structure, stay), used / 2
    pinned = [text for g in structure.groups if g.pin is not None and (text := str(g.pin)) not in notes]
    notes += plan.notes if outcome.committed else [outcome.refused, *plan.notes, *pinned]
    return make_event(
        step=0,
        plan=plan,
        outcome=outcome,
        before=before,
        after=size_of(patient, outcome.structure),
        certificates=certificates,
        measured_on="held-out examples" if verdict.held_out else "of the given inputs",
        seconds=time.perf_counter() - start,
        notes=tuple(notes),
    )


def _check_batches(batches: object) -> None:
    if not isinstance(batches, Iterable) or isinstance(batches, Tensor | Mapping | str):
        raise ArgumentError(f"batches is a {type(batches).__name__}: give a sequence or loader of batches, [batch].")


def _surgery(
    patient: Patient, structure: Structure, plan: Plan, verdict: Verdict, observer: Observer
) -> tuple[Outcome, tuple[Certificate, ...]]:
    probe = verdict.begin(observer.inputs)
    outcome = operate(patient, structure, plan.reductions, plan.dropped_variance, probe, verdict.judge)
    return outcome, verdict.settle() if outcome.committed else ()


def _has_modes(model: nn.Module) -> bool:
    """Whether a norm computes something else in training: a channel may be silent in one mode alone."""
    norms = (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase))
    return any(norm.track_running_stats for norm in norms)


def _observations(observers: Sequence[Observer]) -> Observations:
    first, *others = (observer.observations() for observer in observers)
    found = dict(first)
    for other in others:
        found |= {key: in_both(found.get(key), seen) for key, seen in other.items()}
    return found


def _at_fault(
    patient: Patient, structure: Structure, plan: Plan, verdict: Verdict, observer: Observer
) -> dict[str, Pin]:
    """Return pins for the groups that change the outputs too much, each tried by itself and rolled back.

    All that are beyond the limit alone; where none is, the one that changes most, and the first if none runs alone.
    Measured on the given inputs, so that no confidence of held-out ones is spent.
    """
    probe = verdict.probe
    if observer.inputs is not None:
        probe = as_probe(observer.inputs)
    found = {plan.reductions[0].group: 0.0}
    for reduction in plan.reductions:
        trial = operate(patient, structure, [reduction], plan.dropped_variance, probe, lambda _: "measured")
        if trial.change is not None:
            found[reduction.group] = trial.change.rms
    guilty = [name for name, rms in found.items() if not rms <= verdict.sanity]
    guilty = guilty or sorted(found, key=found.__getitem__)[-1:]
    widths = {group.name: group.num_channels for group in structure.groups}
    return {
        name: Pin(
            group=name,
            num_channels=widths[name],
            reason=f"its removals alone change the outputs by {found[name]:.3g} (relative rms)",
            remedy="Run the network in float64, or allow a tolerance above 0.",
        )
        for name in guilty
    }


def _observe(
    model: nn.Module,
    structure: Structure,
    example: Any,
    batches: Iterable[Any],
    exact: bool,
    modes: int,
    seed: int,
) -> tuple[Observer, Observations]:
    """Run batches through the model until every site has seen enough: in evaluation and, of two modes, in training."""
    groups = [group for group in structure.groups if group.pin is None]
    observer, *others = (
        Observer(model, groups, seed=seed, exact=exact, keep_inputs=mode == 0, any_mode=True, replay=replay)
        for mode in range(modes)
    )
    count, late = 0, frozenset[str]()
    observer.open()
    try:
        with without_trace(model):
            for batch in batches:
                call = _call_of(batch, example)
                args, kwargs = tree_map_only(Tensor, Tensor.clone, call)  # it may write to them
                if num_rows((args, kwargs)) == 0:
                    raise ArgumentError("batches holds a batch without examples along dimension 0.")
                _run(model, args, kwargs, count)
                late = late if count else observer.unseen
                if late:
                    late = _run_late(model, observer, late, tree_map_only(Tensor, Tensor.clone, call))
                over = [observer.end_step()]
                for other in others:
                    with observer.only(frozenset()):
                        over.append(_run_in_training(model, other, tree_map_only(Tensor, Tensor.clone, call)))
                count += 1
                if all(over):
                    break
    finally:
        observer.close()
    if count == 0:
        raise ArgumentError("batches is empty: at least one batch of inputs is needed.")
    return observer, _observations([observer, *others])


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """Training mode without a trace; dropout modules let everything through."""
    with without_trace(model):
        for module in model.modules():
            module.training = not isinstance(module, nn.modules.dropout._DropoutNd)
        yield


def _run_in_training(model: nn.Module, observer: Observer, call: tuple[tuple[Any, ...], dict[str, Any]]) -> bool:
    """Show a batch in training mode, and return whether that is enough; a model that cannot train on it shows none."""
    observer.open()
    try:
        with _training(model):
            with suppress(ArgumentError):
                _run(model, *call, 0)
            return observer.end_step()
    finally:
        observer.close()


def _run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], number: int) -> None:
    try:
        model(*args, **kwargs)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ArgumentError(f"batches: the model fails on batch {number}: {line}") from error


def _run_late(
    model: nn.Module, observer: Observer, late: frozenset[str], call: tuple[tuple[Any, ...], dict[str, Any]]
) -> frozenset[str]:
    """Run a batch in training mode for modules that take part there alone (an auxiliary head); return those it shows.

    A batch on which the model cannot train (one example) shows nothing.
    """
    with _training(model), observer.only(late), suppress(ArgumentError):
        _run(model, *call, 0)
    return late - observer.unseen


def _call_of(batch: Any, example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, Tensor) and not isinstance(batch, Tensor):
        remedy = ""
        if isinstance(batch, list | tuple) and batch and isinstance(batch[0], Tensor):
            names = ("x", "y", *(f"z{i}" for i in range(2, len(batch))))[: len(batch)]
            given = ", ".join(names) + ("," if len(names) == 1 else "")
            remedy = f" For a loader of ({given}) give (x for {given} in loader)."
        raise ArgumentError(f"batches: example_input is a tensor, but a batch is a {type(batch).__name__}.{remedy}")
    if isinstance(example, tuple) and (not isinstance(batch, tuple | list) or len(batch) != len(example)):
        raise ArgumentError(
            f"batches: example_input is a tuple of {len(example)} arguments, but a batch is a {type(batch).__name__}"
            f"{f' of {len(batch)}' if isinstance(batch, tuple | list) else ''}. Give tuples of the model's arguments, "
            "without labels."
        )
    if isinstance(example, Mapping) and not isinstance(batch, Mapping):
        raise ArgumentError(f"batches: example_input is a dict, but a batch is a {type(batch).__name__}.")
    return as_call(tuple(batch) if isinstance(batch, list) else batch, "batches")
