"""Whether a measured change of the outputs is granted, and the certificate it earns.

Lives here: the accuracy budget over a run's attempts and the sanity limit. Does not live here: measuring (probe), the
arithmetic of limits (budget, numerics.bounds).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from apoptosis.budget import ALPHA, Account
from apoptosis.errors import BudgetError
from apoptosis.probe import Change, Probe, num_rows
from apoptosis.records import Certificate

SANITY_RMS = 0.25  # without a budget: relative rms change of the outputs beyond which an event is rolled back

Call = tuple[tuple[Any, ...], Mapping[str, Any]]


class Verdict:
    """Judge of one run: `begin` an attempt, `judge` what was measured, `settle` when it was committed.

    Args:
        budget: share of accuracy for all removals together, or None for the sanity limit alone.
        probe: held-out examples, or None to measure on training inputs.
    """

    def __init__(self, budget: float | None, probe: Probe | None) -> None:
        self.probe = probe
        self.account = Account(budget, 0 if probe is None else probe.rows)
        self.training_flips = 0.0
        self._rows = (0, 0)
        self._pending: Certificate | None = None

    @property
    def held_out(self) -> bool:
        """Whether limits speak of a population."""
        return self.probe is not None

    def check(self, *, readable: bool) -> None:
        """Refuse a budget that can never be granted, before anything starts.

        Raises: BudgetError: no probe, no classes to read, or too few probe rows (the number needed is named).
        """
        if self.account.budget is None:
            return
        if self.probe is None:
            raise BudgetError(
                "budget= needs probe=: held-out inputs (and labels) to measure on; training inputs bound nothing about "
                "the population."
            )
        if not readable:
            raise BudgetError(
                "budget= bounds the share of changed predictions, but the model's output has no classes to read; give "
                "logits=, a function from the output to a tensor (examples, classes)."
            )
        self.account.check()

    def begin(self, inputs: Call | None) -> Probe | None:
        """Examples for the next attempt: held-out ones, else the last training inputs, else nothing."""
        self._pending = None
        if self.probe is not None:
            self._rows = self.account.next_rows()
            return self.probe.take(*self._rows)
        if inputs is None:
            return None
        rows = num_rows(inputs)
        self._rows = (0, rows)
        return Probe(args=inputs[0], kwargs=inputs[1], labels=None, rows=rows, held_out=False)

    def judge(self, change: Change) -> str:
        """Why a change is refused, "" when it is granted. Every attempt on a probe spends confidence."""
        first, last = self._rows
        budget = self.account.budget
        if self.held_out and change.readable:
            limit = self.account.attempt(first, last, change.losses)
            note = "part of the ledger's sum: the confidence is that of all attempts of the run together"
            self._pending = Certificate(
                kind="accuracy",
                subject="outputs",
                value=limit,
                rows=last - first,
                confidence=1.0 - ALPHA,
                population=True,
                note=note,
            )
            if not self.account.grants(limit):
                return f"accuracy limit {limit:.3g} on top of {self.account.spent:.3g} exceeds the budget {budget:g}"
        elif change.readable:
            value, note = change.flips / change.rows, "on training inputs: nothing is claimed about the population"
            self._pending = Certificate(kind="accuracy", subject="outputs", value=value, rows=change.rows, note=note)
        if budget is None and not change.rms <= SANITY_RMS:
            return f"the outputs changed by {change.rms:.3g} (relative rms), beyond the sanity limit {SANITY_RMS}"
        return ""

    def settle(self) -> tuple[Certificate, ...]:
        """Book the limit of an attempt that was committed, and return its certificate."""
        certificate, self._pending = self._pending, None
        if certificate is None:
            return ()
        if certificate.population:
            self.account.spent += certificate.value
        else:
            self.training_flips += certificate.value
        return (certificate,)

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"account": self.account.state_dict(), "training_flips": self.training_flips}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` wrote, or raise and change nothing."""
        flips = float(state["training_flips"])
        self.account.load_state_dict(state["account"])
        self.training_flips = flips
