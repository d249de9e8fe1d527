"""Tables of docs/method.md from the trials' JSON.

Holds: rows of Markdown. Elsewhere: what they are computed from (fit.py), where they go (benchmarks.table).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.aftermath import fit
from benchmarks.paper.summary import table as markdown

Results = Mapping[str, Mapping[str, Any]]
EMPTY = "No results are committed yet; `python -m benchmarks.aftermath` makes them."
NAMES = {"mlp": "MLP", "gpt": "GPT", "cnn": "CNN", "resnet": "ResNet", "minilm": "MiniLM, fine-tuned",
         "efficientnet": "EfficientNet, fine-tuned"}  # fmt: skip


def _trials(results: Results) -> list[Mapping[str, Any]]:
    return list(results.get("aftermath", {}).get("trials", ()))


def bank(results: Results) -> str:
    """Which trials there are."""
    trials, rows = _trials(results), []
    for task in fit.tasks_of(trials):
        own = [t for t in trials if t["task"] == task and "at_once" in t]
        after = [t for t in own if "later" in t]
        steps = sorted({t["step"] for t in own})
        whole = f"{own[0]['steps']}"
        ended = sum(fit.to_end(t) for t in after)
        rows.append((NAMES[task], whole, ", ".join(map(str, steps)), str(len(own)), str(len(after)), str(ended)))
    total = [str(sum(int(row[i]) for row in rows)) for i in (3, 4, 5)]
    head = ("task", "steps of the run", "removals after step", "trials", "trained on", "to the end of the run")
    return markdown(head, [*rows, ("all", "", "", *total)]) if rows else EMPTY


def ranks(results: Results) -> str:
    """How well what is known at once ranks what lasts at the end of the run."""
    trials = [t for t in _trials(results) if "at_once" in t]
    ended, soon = fit.ranks(trials, long=True), fit.ranks(trials, long=False)
    if not ended:
        return EMPTY
    formula = _formula_ranks(results)
    rows = [
        (name, *(f"{ended[task][name]:.2f}" for task in ended), *(f"{soon[task][name]:.2f}" for task in soon))
        for name in fit.KNOWN
    ]
    rows.append(
        (
            "**the formula below**",
            *(f"**{formula[task]:.2f}**" if task in formula else "" for task in ended),
            *("" for _ in soon),
        )
    )
    head = (
        "known at once",
        *(f"{NAMES[task]}" for task in ended),
        *(f"{NAMES[task]}, 20 to 40 steps on" for task in soon),
    )
    return markdown(head, rows)


def _formula_ranks(results: Results) -> dict[str, float]:
    return fit.rank_of(fit.CHOSEN, fit.fitted(results["aftermath"]))


def widths(results: Results) -> str:
    """Whether sensitivities hold over widths, and whether they add up."""
    trials = [t for t in _trials(results) if "at_once" in t]
    over, sums, rows = fit.over_widths(trials), fit.over_sums(trials), []
    later = fit.lasting_over_sums(trials)
    for task in fit.tasks_of(trials):
        found = [_spread(over.get(task, {}).get(share, ())) for share in ("0.25", "0.75")]
        found += [_spread(sums.get(task, {}).get(share, ())) for share in ("0.25", "0.5", "0.75")]
        rows.append((NAMES[task], *found, _spread(later.get(task, ()))))
    head = ("task", "25 % removed", "75 % removed", "sum, 25 %", "sum, 50 %", "sum, 75 %", "lasting cost, sum")
    return markdown(head, rows) if rows else EMPTY


def _spread(values: Sequence[float]) -> str:
    if not len(values):
        return ""
    low, middle, high = np.percentile(values, (10, 50, 90))
    return f"{middle:.2f} ({low:.2f} to {high:.2f}; {len(values)})"


def formulas(results: Results) -> str:
    """What foretells the cost at the end of a run on tasks that it was not fitted to."""
    if "aftermath" not in results:
        return EMPTY
    trials = fit.fitted(results["aftermath"])
    if len(fit.tasks_of(trials)) < 2:
        return EMPTY
    rows = []
    for formula in fit.FORMULAS:
        constants = formula.fit(trials)
        errors = formula.errors(trials)
        every = np.abs(np.concatenate(list(errors.values())))
        worst = max(errors, key=lambda task: abs(float(np.median(errors[task]))))
        own = list(fit.rank_of(formula, trials).values())
        bold = "**" if formula is fit.CHOSEN else ""
        rows.append(
            (
                f"{bold}{formula.name}{bold}",
                ", ".join(f"{c:.2g}" for c in constants),
                f"{2 ** np.median(every):.1f}x",
                f"{2 ** np.percentile(every, 80):.1f}x",
                f"{NAMES[worst]}: {2 ** float(np.median(errors[worst])):.2g}x",
                f"{np.median(own):.2f}",
            )
        )
    head = (
        "cost = constants times",
        "constants",
        "typical error",
        "80 % within",
        "task that is farthest off",
        "rank within a task",
    )
    return markdown(head, rows)


def fading(results: Results) -> str:
    """How the difference of the loss goes on after a removal."""
    rows = []
    for t in fit.made(_trials(results)):
        if t["what"] not in ("all", "branch") or t["share"] == 0.75 or not fit.to_end(t):
            continue
        after = {int(end): difference for _, end, difference in t["later"]}
        soon = [f"{after[end]:.4f}" if end in after and end != t["k"] else "" for end in (10, 40, 160)]
        what = "half of every group" if t["what"] == "all" else f"branch {t['name']}"
        rows.append(
            (NAMES[t["task"]], what, f"{100 * t['step'] / t['steps']:.0f} %", f"{t['at_once']['kl']:.4f}", *soon,
             f"{fit.lasting(t):.4f}", f"{t['later_held_out']:.4f}")
        )  # fmt: skip
    head = ("task", "removed", "after", "divergence at once", "loss, steps 1 to 10", "21 to 40", "81 to 160",
            "second half of the rest", "held out, at the end")  # fmt: skip
    return markdown(head, rows) if rows else EMPTY


TABLES: dict[str, Callable[[Results], str]] = {
    "aftermath-bank": bank,
    "aftermath-ranks": ranks,
    "aftermath-widths": widths,
    "aftermath-formulas": formulas,
    "aftermath-fading": fading,
}
