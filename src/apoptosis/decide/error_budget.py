"""What all removals together may cost in accuracy: which probe rows an attempt uses, at which confidence.

Holds: the arithmetic of spending the budget (Theorem "Ledger sum" of docs/theory.md). Elsewhere: running
the network (model.evaluate) or the limits themselves (numerics.bounds).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from apoptosis.errors import BudgetError
from apoptosis.numerics.bounds import alpha_for_attempt, clopper_pearson_upper, required_probe_rows

ALPHA = 0.05  # the ledger's limit holds with confidence 1 - ALPHA over all attempts of a run
CLEAN_EVENTS = 8  # a fresh block of probe rows is sized so that this many clean events fit the budget


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


def _overlaps(start: int, stop: int, earlier: list[tuple[int, int]]) -> int:
    """How many of the earlier row ranges share rows with start..stop."""
    return sum(first < stop and start < last for first, last in earlier)
