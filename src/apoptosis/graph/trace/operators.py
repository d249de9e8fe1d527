"""One row of the table of operators: all that the library knows of an operator.

Holds: the columns. Elsewhere: the table (rules/table.py), the rules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from apoptosis.graph.trace.values import Value

if TYPE_CHECKING:
    from apoptosis.graph.trace.tracer import Call

Result = Value | Sequence[Value | None] | None
Rule = Callable[["Call"], Result]
Role = Literal["", "moves", "multiplies", "divides", "adds", "powers", "sums", "contracts", "attends"]


@dataclass(frozen=True, slots=True)
class Operator:
    """What one operator does.

    rule: which channels its outputs carry; None: there is no rule, and all that reaches the operator is pinned.
    reads: whether it uses the values of its operands. picks: whether it matters which channels it works on.
    numbers: returns the plain numbers of a call (and what came out) that an edit has to leave as they are, if any.
    role: what becomes of a plain number that its operand was multiplied with (trace/multiples.py). power: of "powers";
    None: it is the second argument. fills: it makes a tensor of a plain number.
    folds: what reads a parameter in this way can be folded into the parameter.
    literal: its output is written out in the model's code (positions).
    writes_beside: it writes to a buffer, or to noise, beside its output. reshapes: its in-place form changes the shape
    of a tensor object and not its memory.
    """

    rule: Rule | None = None
    reads: bool = True
    picks: bool = True
    numbers: Callable[[Call, Any], tuple[complex, ...]] | None = None
    role: Role = ""
    power: float | None = None
    fills: bool = False
    folds: bool = False
    literal: bool = False
    writes_beside: bool = False
    reshapes: bool = False


UNKNOWN = Operator(picks=False)
