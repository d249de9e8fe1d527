"""Passes at construction, which find out what a model does with its inputs.

Holds: which dimension counts examples, whether classes can be read off the outputs, whether outputs before and
after an event can be compared, and the warning where not. Elsewhere: running and comparing (evaluate).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from apoptosis.distributed.ranks import Ranks
from apoptosis.errors import ArgumentError, OutOfMemoryError, RankError, one_line
from apoptosis.model.evaluate import (
    Call,
    Probe,
    as_probe,
    check_labels,
    check_rows,
    comparable,
    cuts_of,
    logits_of,
    outputs,
    training_outputs,
)
from apoptosis.model.outputs import ReadLogits, kind_of
from apoptosis.model.outputs import read as read_output

_INDEPENDENT = 2e-2  # relative difference up to which an example's output is the same whichever others come along


def check_runs(model: nn.Module, probe: Probe, read: ReadLogits | None = None, ranks: Ranks | None = None) -> Probe:
    """Find out by running the model which dimension of every input counts examples, and return the probe cut so.

    Some examples must give the same outputs by themselves as among others, one row for each. Where no dimension does,
    the inputs are run as they are, all at once.

    Args:
        model: in whatever mode; it is run in evaluation mode.
        probe: as `make_probe` read it.
        read: as logits=.
        ranks: that take part in every pass, and get the same answer.

    Raises: ArgumentError: the model fails on it, labels name no class, or its outputs have no row for each example.
    """
    ranks, faults = ranks or Ranks(), list[str]()
    for cut in cuts_of(probe):
        fault = ranks.first_error(ranks.run_collectively(partial(_fault_of_cut, model, cut, read)))
        if not fault:
            return cut
        faults.append(fault)
    rows = probe.rows if probe.labels is None else len(probe.labels)
    whole = replace(probe, rows=rows, cut=None)
    return ranks.run_collectively(lambda: _run_whole(model, whole, read, faults))


def _fault_of_cut(model: nn.Module, probe: Probe, read: ReadLogits | None) -> str:
    """Return "" if examples are independent along the dimensions that a probe is cut along, else what shows that not.

    Raises: ArgumentError: labels name no class of the outputs.
    """
    most = min(3, probe.rows)
    outs: list[Any] = []
    for rows, seed in ((most, 0), (most - 1, 0), (most - 1, 1)):  # as many passes on every rank
        part = probe.take(0, rows)
        try:
            (out,) = outputs(model, part, seed=seed)
            logits = logits_of(out, read)
            check_rows(out, logits, rows)
        except (OutOfMemoryError, RankError):
            raise
        except ArgumentError as error:
            return str(error)
        except Exception as error:  # noqa: BLE001 - the user's forward may raise anything: it does not run on a part
            return f"probe: {one_line(error)}."
        outs.append(out)
        if logits is not None and probe.labels is not None:
            check_labels(probe.labels, logits.shape[1])
    among, alone, again = (read_output(out, read) for out in outs)
    for path, x in alone.numbers.items():
        y = among.numbers.get(path)
        if y is None or not x.numel() or not torch.equal(x, again.numbers.get(path, x)):
            continue  # what is drawn at random says nothing
        dims = [dim for dim in range(x.dim()) if x.shape[dim] == most - 1 and y.shape[dim] == most]
        if dims:
            y = y.narrow(dims[0], 0, most - 1)
        if y.shape != x.shape or float((y - x).abs().max()) > _INDEPENDENT * float(y.abs().max()):
            return "probe: the output of an example depends on the other examples of the batch."
    return ""


def _run_whole(model: nn.Module, probe: Probe, read: ReadLogits | None, faults: Sequence[str]) -> Probe:
    """Run a probe that cannot be cut; what its outputs are known to hold one row each of are its examples.

    Raises: ArgumentError: the model fails on it, or nothing says how many examples its rows are.
    """
    try:
        (out,) = outputs(model, probe)
        logits = logits_of(out, read)
    except (OutOfMemoryError, RankError, ArgumentError):
        raise
    except Exception as error:  # the user's forward may raise anything
        raise ArgumentError(f"probe: the model fails on it: {one_line(error)}") from error
    if logits is None:
        return probe
    if probe.labels is not None:
        if len(probe.labels) != len(logits):
            raise ArgumentError(f"probe: {len(probe.labels)} labels for outputs of {len(logits)} rows.")
        check_labels(probe.labels, logits.shape[1])
    elif not replace(probe, held_out=False).counts(len(logits)):
        raise ArgumentError(
            f"{faults[0] if faults else f'probe: outputs of {len(logits)} rows.'} Give labels with the probe, (inputs, "
            "labels), one for every row of the outputs."
        )
    return replace(probe, rows=len(logits))


def has_classes(model: nn.Module, call: Call, read: ReadLogits | None) -> bool:
    """Whether logits, one row per example, can be read off the model's output on the example input."""
    example = as_probe(call)
    logits = logits_of(outputs(model, example)[0], read)
    return logits is not None and example.counts(len(logits))


def warn_if_not_compared(
    model: nn.Module, probe: Probe, read: ReadLogits | None, *, remedy: str, ranks: Ranks | None = None
) -> None:
    """Warn, once per construction, where evaluation returns no numbers, so that events cannot be checked by them."""
    ranks, part = ranks or Ranks(), probe.take(0, min(2, probe.rows))
    outs = ranks.run_collectively(lambda: outputs(model, part))
    if not ranks.any(not comparable(outs, read)):
        return
    trains = ranks.all(training_outputs(model, part, read) is not None)
    what = "what training mode returns is compared instead"
    if not trains:
        what = "nor can that of training mode be compared, so that events say 'outputs not compared'"
    warnings.warn(
        f"{type(model).__name__} returns {kind_of(outs[0])} in evaluation mode, without numbers that could be compared "
        f"before and after an event: {what}. {remedy}",
        UserWarning,
        stacklevel=4,
    )


def looked_at(
    model: nn.Module,
    probe: Probe | None,
    call: Call,
    read: ReadLogits | None,
    *,
    remedy: str,
    ranks: Ranks | None = None,
) -> Probe | None:
    """Return the held-out probe as it can be run (`check_runs`), and warn where outputs cannot be compared."""
    probe = None if probe is None else check_runs(model, probe, read, ranks)
    warn_if_not_compared(model, probe or as_probe(call), read, remedy=remedy, ranks=ranks)
    return probe
