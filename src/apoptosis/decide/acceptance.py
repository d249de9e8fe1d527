"""Whether a measured change of the outputs is accepted, and the certificate for it.

Holds: which examples an attempt is measured on, the test against error budget and sanity limit, its result as a value,
and the arithmetic of spending the budget (Theorem "Ledger sum" of docs/theory.md). Elsewhere: running the network
(model.evaluate), the limits themselves (numerics.bounds).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from apoptosis.decide.goal import Goal
from apoptosis.distributed.ranks import Ranks
from apoptosis.errors import ArgumentError, BudgetError, CheckpointError
from apoptosis.model.evaluate import Call, Probe, as_probe
from apoptosis.model.outputs import Change
from apoptosis.numerics.bounds import alpha_for_attempt, clopper_pearson_upper, required_probe_rows
from apoptosis.records import Certificate

SANITY_RMS = 0.25  # without a budget: relative rms change of the outputs beyond which an event is rolled back
EXACT_RMS = 1e-3  # the same at tolerance 0 in float32, where more than round-off can only be a wrong structure
EXACT_RMS_DOUBLE = 1e-5  # and in float64, where sums of squares resolve some 1e-6 of a site's output
ALPHA = 0.05  # the ledger's limit holds with confidence 1 - ALPHA over all attempts of a run
CLEAN_EVENTS = 8  # a fresh block of probe rows is sized so that this many clean events fit the budget


def sanity_limit(model: nn.Module, tolerance: float | None, goal: Goal | None = None) -> float:
    """Return the relative rms change of the outputs beyond which an event is rolled back, without a budget.

    There is none on the way to a goal: the size was asked for, and outputs of infinity or NaN are refused all the same.
    At tolerance 0 it is the round-off of the parameters' type, with a margin for several layers.
    """
    if goal is not None:
        return math.inf
    if tolerance != 0:
        return SANITY_RMS
    coarsest = max((torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point()), default=0.0)
    least = EXACT_RMS_DOUBLE if coarsest <= torch.finfo(torch.float64).eps else EXACT_RMS
    return min(SANITY_RMS, max(least, 8 * coarsest))


@dataclass(slots=True)
class ErrorBudget:
    """Upper limits of the accepted events so far.

    budget: share of accuracy, or None when only the sum is kept; rows: of the probe, ranks: how many probes like it are
    tested together. spent: sum of the limits of accepted events.
    tested: (start, stop) of the probe rows of every attempt so far.
    """

    budget: float | None
    rows: int
    ranks: int = 1
    spent: float = 0.0
    tested: list[tuple[int, int]] = field(default_factory=list)

    @property
    def attempts(self) -> int:
        """Attempts so far, rolled back ones included."""
        return len(self.tested)

    @property
    def used(self) -> int:
        """Rows from here on were not used by any attempt."""
        return max((stop for _, stop in self.tested), default=0)

    @property
    def reused(self) -> bool:
        """Whether some rows served more than one attempt, or count as if they had."""
        return any(_overlaps(*rows, self.tested[:i]) for i, rows in enumerate(self.tested))

    def check(self) -> None:
        """Refuse a probe that is too small for the budget, naming the number of rows that would do.

        Raises: BudgetError: even one clean event costs more than the budget.
        """
        if self.budget is None:
            return
        needed = required_probe_rows(self.budget, alpha_for_attempt(1, ALPHA))
        if self.rows * self.ranks < needed:
            raise BudgetError(
                f"budget={self.budget:g} can never be kept with a probe of {self.rows * self.ranks} examples: even an "
                f"event that changes no prediction needs N = {needed}. Give a larger probe or a larger budget."
            )

    def next_rows(self) -> tuple[int, int]:
        """Probe rows (start, stop) of the next attempt: rows no attempt has used while there are enough, else all."""
        if self.budget is None:
            block = max(1, self.rows // CLEAN_EVENTS)
        else:
            wanted = required_probe_rows(self.budget / CLEAN_EVENTS, alpha_for_attempt(self.attempts + 1, ALPHA))
            block = -(-wanted // self.ranks)
        if self.used + block <= self.rows:
            return self.used, self.used + block
        return 0, self.rows

    def reshard_probe(self) -> None:
        """Count all rows as tested by every attempt so far: other ranks hold them now, and which were is not known.

        The limits so far are of the population and stay true however the rows lie. The limits to come stay true where
        more results are counted against them than there were on their rows (Theorem "Alpha spending").
        """
        self.tested = [(0, self.rows)] * len(self.tested)

    def attempt(self, start: int, stop: int, losses: int, *, rows: int | None = None) -> float:
        """Book an attempt on rows start..stop with `losses` changed examples; returns its upper limit (a share).

        rows: examples of all ranks' probes together, where they are others than start..stop. Every attempt spends
        confidence, rolled back or not.
        """
        # On rows tested before, what is tried may depend on those results: each doubles what might have been tried.
        earlier = _overlaps(start, stop, self.tested)
        self.tested.append((start, stop))
        alpha = alpha_for_attempt(self.attempts, ALPHA, earlier_results=earlier)
        return clopper_pearson_upper(losses, stop - start if rows is None else rows, alpha)

    def allows(self, limit: float) -> bool:
        """Whether the budget still covers a limit."""
        return self.budget is None or self.spent + limit <= self.budget

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"spent": self.spent, "judged": [list(rows) for rows in self.tested]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` wrote, or raise and change nothing."""
        spent, tested = float(state["spent"]), [(int(start), int(stop)) for start, stop in state["judged"]]
        if not 0 <= spent < math.inf or any(not 0 <= start <= stop for start, stop in tested):
            raise ValueError(f"the error budget, {spent} spent, is damaged")
        self.spent, self.tested = spent, tested


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """What one attempt is measured on: examples start..stop of the run's probe, or all of some training inputs."""

    probe: Probe | None
    start: int = 0
    stop: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class AcceptanceResult:
    """What one acceptance test measured and decided.

    change: how far the outputs moved. refused: why that is not accepted, "" if it is. cause: "outputs" where they moved
    too far, "measured" where another limit was exceeded, "exchange" where the event is not worth its cost in the long
    run. certificate: the limit on the share of predictions that changed, None where no classes can be read off the
    outputs.
    """

    change: Change
    refused: str = ""
    cause: str = "measured"
    certificate: Certificate | None = None


class AcceptanceTest:
    """The acceptance test of a run: `examples` to measure on, `check` of what was measured, `record` if it is kept.

    Args:
        budget: share of accuracy for all removals together, or None for the sanity limit alone.
        probe: held-out examples, or None to measure on training inputs.
        ranks: that decide together, each on its own share of the held-out examples.

    Raises: ArgumentError: two ranks have the same probe, or only some have one.
    """

    def __init__(
        self, budget: float | None, probe: Probe | None, *, sanity: float = SANITY_RMS, ranks: Ranks | None = None
    ) -> None:
        self.probe = probe
        self.sanity = sanity
        self._mark = None if probe is None else fingerprint(probe)
        self._marks = (ranks or Ranks()).gathered(self._mark)
        _check_shares(self._marks)
        rows = [0 if mark is None else int(mark["rows"]) for mark in self._marks]
        self.error_budget = ErrorBudget(budget, min(rows), len(rows))
        self.training_flips = 0.0
        self.named = probe is not None and probe.labels is not None
        self._tested = 0  # attempts whose outputs could be read

    @property
    def held_out(self) -> bool:
        """Whether limits hold for a population."""
        return self.probe is not None

    def check_budget(self, *, readable: bool, named: bool = False) -> None:
        """Refuse a budget that can never be kept, before anything starts.

        Args:
            readable: whether the outputs have two columns or more.
            named: whether the user said with logits= which outputs are classes. Labels in the probe say so too;
                without either the columns may be anything, and nothing is claimed about accuracy.

        Raises: BudgetError: no probe, no classes to read, or too few probe rows (the number needed is named).
        """
        self.named = self.named or named
        if self.error_budget.budget is None:
            return
        if self.probe is None:
            raise BudgetError(
                "budget= needs probe=: held-out inputs (and labels) to measure on; training inputs give no bound for "
                "other inputs."
            )
        if not readable:
            raise BudgetError(
                "budget= bounds the share of changed predictions, but the model's output has no classes to read; give "
                "logits=, a function from the output to a tensor (examples, classes)."
            )
        if not self.named:
            raise BudgetError(
                "budget= bounds accuracy, but the outputs may be no classes: give labels with the probe or logits=."
            )
        self.error_budget.check()

    def examples(self, inputs: Call | None) -> Examples:
        """Return what the next attempt is measured on: held-out examples, else these training inputs, if any."""
        if self.probe is None:
            return Examples(probe=None if inputs is None else as_probe(inputs))
        start, stop = (0, self.probe.rows) if self.probe.cut is None else self.error_budget.next_rows()
        return Examples(probe=self.probe.take(start, stop), start=start, stop=stop)

    def check(self, examples: Examples, change: Change) -> AcceptanceResult:
        """Decide about a change that was measured. On held-out examples every check spends confidence."""
        certificate = self._certificate(examples, change) if change.readable else None
        refused = self._refused(change, certificate)
        cause = "outputs" if refused and refused == self._beyond_sanity(change) else "measured"
        return AcceptanceResult(change=change, refused=refused, cause=cause, certificate=certificate)

    def _certificate(self, examples: Examples, change: Change) -> Certificate:
        """Return the limit on the share of predictions that changed; the error budget counts the attempt."""
        self._tested += 1
        what = "" if self.named else "share of examples whose largest output changed, which need not be accuracy; "
        if not self.held_out:
            note = f"{what}on training inputs: no held-out data, so no bound"
            value = change.flips / change.rows
            return Certificate(kind="accuracy", subject="outputs", value=value, rows=change.rows, note=note)
        return Certificate(
            kind="accuracy",
            subject="outputs",
            value=self.error_budget.attempt(examples.start, examples.stop, change.losses, rows=change.rows),
            rows=change.rows,
            confidence=1.0 - ALPHA,
            population=True,
            note=f"{what}part of the ledger's sum: the confidence is that of all attempts of the run together",
        )

    def _refused(self, change: Change, certificate: Certificate | None) -> str:
        """Say why a change is not accepted, "" if it is."""
        budget, spent = self.error_budget.budget, self.error_budget.spent
        if certificate is not None and certificate.population and not self.error_budget.allows(certificate.value):
            limit = f"what it may cost in accuracy ({certificate.value:.3g})"
            return f"{limit}, on top of {spent:.3g} of earlier events, exceeds the budget {budget:g}"
        if budget is not None and certificate is None:
            return "the outputs on the probe have not one row of classes per example, so that no limit can be given"
        return self._beyond_sanity(change) if budget is None or self.sanity < SANITY_RMS else ""

    def _beyond_sanity(self, change: Change) -> str:
        """Say how far beyond the sanity limit a change is, "" if it is not, or if nothing could be compared."""
        if change.mode and not change.rms <= self.sanity:
            where = " in training mode" if change.mode == "training" else ""
            return (
                f"the outputs changed by {change.rms:.3g} (relative rms){where}, beyond the sanity limit {self.sanity}"
            )
        if not change.mode and change.changed is not None and change.changed > self.sanity:
            share = f"{100 * change.changed:.3g} % of the integers that the network returns changed"
            return f"{share}, beyond the sanity limit of {100 * self.sanity:g} %"
        return ""

    def record(self, result: AcceptanceResult) -> None:
        """Add the limit of a change that is kept to what all changes cost."""
        if result.certificate is None:
            return
        if result.certificate.population:
            self.error_budget.spent += result.certificate.value
        else:
            self.training_flips += result.certificate.value

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "account": self.error_budget.state_dict(),
            "training_flips": self.training_flips,
            "judged": self._tested,
            "probe": self._marks,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` wrote, or raise and change nothing.

        On another number of ranks the rows held out are divided otherwise, and no rank knows which it had before: then
        every row counts as tested by every attempt so far.

        Raises: CheckpointError: attempts were tested on another probe; what differs is named.
        """
        error_budget = ErrorBudget(self.error_budget.budget, self.error_budget.rows, self.error_budget.ranks)
        error_budget.load_state_dict(state["account"])
        flips, tested = float(state["training_flips"]), int(state["judged"])
        if tested or error_budget.tested or error_budget.spent > 0:
            stored = state["probe"]
            divided_anew = len(stored) != len(self._marks)
            for was, own in zip(stored[:1] if divided_anew else stored, self._marks, strict=False):
                _check_same(was, own, as_shares=divided_anew)
            if divided_anew:
                error_budget.reshard_probe()
        self.error_budget, self.training_flips, self._tested = error_budget, flips, tested


def _check_shares(marks: Sequence[Mapping[str, Any] | None]) -> None:
    for rank, mark in enumerate(marks):
        if (mark is None) != (marks[0] is None):
            raise ArgumentError(
                f"probe=: rank 0 and rank {rank} differ in whether they have one; give all of them one."
            )
        if mark is not None and mark in marks[:rank]:
            raise ArgumentError(
                f"probe=: rank {list(marks).index(mark)} and rank {rank} have the same examples, which would count "
                "twice; give every rank a share of its own."
            )


def fingerprint(probe: Probe) -> dict[str, Any]:
    """Return what identifies a probe: rows, shape and a weighted sum of inputs and of labels."""
    leaves = tree_flatten((probe.args, dict(probe.kwargs)))[0]
    cut = probe.cut or (0,) * len(leaves)
    tensors = ((x, dim) for x, dim in zip(leaves, cut, strict=True) if isinstance(x, Tensor) and x.dim())
    first = next(x.movedim(dim, 0) for x, dim in tensors if dim is not None)
    return {
        "rows": probe.rows,
        "held_out": probe.held_out,
        "shape": list(first.shape),
        "inputs": _weighted_sum(first),
        "labels": None if probe.labels is None else _weighted_sum(probe.labels),
    }


def _weighted_sum(x: Tensor) -> float:
    """Mean over rows in float64, weighted by position: the order of rows decides which attempt sees which."""
    x = x.detach()
    rows = (torch.view_as_real(x) if x.is_complex() else x).double().reshape(len(x), -1).sum(1)
    return float((rows * torch.arange(1, len(x) + 1, device=x.device)).sum() / len(x))


def _check_same(stored: Mapping[str, Any] | None, own: Mapping[str, Any] | None, *, as_shares: bool) -> None:
    """Raise CheckpointError unless two fingerprints are of one probe, or may be of shares of one."""
    if stored is None or own is None:
        if stored is own:
            return
        reported = ("no probe", "one") if stored is None else (f"a probe of {stored['rows']} rows", "none")
        raise CheckpointError(
            f"apoptosis state: its limits were measured with {reported[0]}, this run has {reported[1]}."
        )
    if as_shares:
        stored, own = _of_every_share(stored), _of_every_share(own)
    for name, value in own.items():
        was = stored[name]
        numbers = isinstance(was, float) and isinstance(value, float)  # sums, whose last digits depend on the machine
        if not (math.isclose(was, value, rel_tol=1e-9, abs_tol=1e-6) if numbers else was == value):
            raise CheckpointError(
                f"apoptosis state: its limits were measured on another probe ({name}: {was} there, {value} here). "
                "Resume with the probe it was started with."
            )


def _of_every_share(mark: Mapping[str, Any]) -> dict[str, Any]:
    return {"held_out": mark["held_out"], "shape": mark["shape"][1:], "labels": mark["labels"] is not None}


def _overlaps(start: int, stop: int, earlier: list[tuple[int, int]]) -> int:
    """How many of the earlier row ranges share rows with start..stop."""
    return sum(first < stop and start < last for first, last in earlier)
