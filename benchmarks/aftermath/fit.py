"""What the trials say together: how well quantities known at once rank what lasts, and the formula fitted to it.

Holds: rank correlations, widths, sums, fading, formulas with the error on tasks they were not fitted to. Elsewhere: the
trials (trials.py), the formula as the library uses it (apoptosis.decide.exchange), the page (docs/method.md).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares
from scipy.stats import spearmanr

Trial = Mapping[str, Any]
Floats = NDArray[np.float64]
FLOOR = 1e-3  # nats: costs below it do not matter, and drown in what differs between twins
TINY = 1e-12
FEWEST = 6  # trials of a task whose ranks mean something

KNOWN: dict[str, Callable[[Trial], float | None]] = {
    "divergence of the outputs": lambda t: t["at_once"]["kl"],
    "squared relative rms of the outputs": lambda t: t["at_once"]["rms_squared"],
    "training loss, change": lambda t: t["at_once"]["loss"],
    "relative error squared": lambda t: t.get("error_squared"),
    "the same, every output alike": lambda t: t.get("plain_squared"),
    "gradient-weighted error, absolute": lambda t: t.get("energy"),
    "share of the channels removed": lambda t: t.get("share_removed"),
    "share of the multiply-adds removed": lambda t: 1 - t["macs_left"] if "macs_left" in t else None,
}


def made(trials: Iterable[Trial]) -> list[Trial]:
    """Return the trials that removed something and went on."""
    return [t for t in trials if "later" in t and t["what"] != "noise"]


def lasting(trial: Trial) -> float:
    """Return the mean difference of the training loss over the last window."""
    return float(trial["later"][-1][2])


def is_long(trial: Trial) -> bool:
    """Whether a trial is one of a few beside those at the same point."""
    return "|long|" in trial["key"]


def to_end(trial: Trial) -> bool:
    """Whether a trial went on to the end of the run."""
    return bool(trial["step"] + trial["k"] == trial["steps"])


def tasks_of(trials: Iterable[Trial]) -> list[str]:
    return list(dict.fromkeys(t["task"] for t in trials))


# ---------------------------------------------------------------------- ranks


def ranks(trials: Sequence[Trial], *, long: bool) -> dict[str, dict[str, float]]:
    """Return task -> quantity -> Spearman's rank correlation with what lasts, over groups and whole networks.

    long: of the trials that went on to the end of the run, else of the others.
    """
    found: dict[str, dict[str, float]] = {}
    for task in tasks_of(trials):
        own = [t for t in made(trials) if t["task"] == task and t["what"] in ("group", "all") and to_end(t) == long]
        if len(own) < FEWEST:
            continue
        cost = [lasting(t) for t in own]
        found[task] = {name: float(spearmanr([_number(of(t)) for t in own], cost)[0]) for name, of in KNOWN.items()}
    return found


def _number(value: float | None) -> float:
    return np.nan if value is None else float(value)


# ---------------------------------------------------------------------- widths and sums


def over_widths(trials: Sequence[Trial]) -> dict[str, dict[str, list[float]]]:
    """Return task -> share removed -> divergence over what that at half of the channels foretells.

    Foretold: the divergence at half, times the squared relative error there over that at half.
    """
    groups: dict[tuple[Any, ...], dict[float, Trial]] = defaultdict(dict)
    for t in trials:
        if t.get("what") == "group" and not is_long(t):
            groups[t["task"], t["step"], t["name"]][t["share"]] = t
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for (task, *_), own in groups.items():
        half = own.get(0.5)
        if half is None or min(half["error_squared"], half["at_once"]["kl"]) <= TINY:
            continue
        for share in sorted(own.keys() - {0.5}):
            foretold = half["at_once"]["kl"] * own[share]["error_squared"] / half["error_squared"]
            if foretold > TINY:
                found[task][f"{share:g}"].append(own[share]["at_once"]["kl"] / foretold)
    return {task: dict(by_share) for task, by_share in found.items()}


def over_sums(trials: Sequence[Trial]) -> dict[str, dict[str, list[float]]]:
    """Return task -> share removed -> divergence of many groups together over the sum of the single ones."""
    single: dict[tuple[Any, ...], float] = {}
    units: dict[tuple[Any, ...], tuple[str, ...]] = {}
    for t in trials:
        if t.get("what") == "group" and not is_long(t):
            at = t["task"], t["step"], t["share"]
            single[*at, tuple(t["groups"])] = t["at_once"]["kl"]
            units |= {(*at, name): tuple(t["groups"]) for name in t["groups"]}
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for t in trials:
        if t.get("what") in ("all", "half") and not is_long(t):
            at = t["task"], t["step"], t["share"]
            own = {units.get((*at, name)) for name in t["groups"]}
            if None not in own and len(own) > 1:
                total = sum(single[*at, unit] for unit in own)
                if total > TINY:
                    found[t["task"]][f"{t['share']:g}"].append(t["at_once"]["kl"] / total)
    return {task: dict(by_share) for task, by_share in found.items()}


def lasting_over_sums(trials: Sequence[Trial]) -> dict[str, list[float]]:
    """Return task -> what lasts of all groups together over the sum of what lasts of the single ones.

    Where each of them went on as long, and the sum is above FLOOR.
    """
    by_point: dict[tuple[Any, ...], list[Trial]] = defaultdict(list)
    for t in made(trials):
        by_point[t["task"], t["step"], t["share"], t["k"]].append(t)
    found: dict[str, list[float]] = defaultdict(list)
    for (task, *_), own in by_point.items():
        single = {name: t for t in own if t["what"] == "group" for name in t["groups"]}
        for whole in (t for t in own if t["what"] == "all" and set(t["groups"]) <= single.keys()):
            parts = {single[name]["key"]: lasting(single[name]) for name in whole["groups"]}
            if len(parts) > 1 and sum(parts.values()) > FLOOR:
                found[task].append(lasting(whole) / sum(parts.values()))
    return dict(found)


# ---------------------------------------------------------------------- formulas

Term = Callable[[Trial], float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Formula:
    """cost = sum of constants[i] * terms[i], constants not negative; a term below 1e-9 counts as that."""

    name: str
    terms: tuple[Term, ...]

    def values(self, trials: Sequence[Trial]) -> Floats:
        rows = [[max(_number(of(t)), 1e-9) for of in self.terms] for t in trials]
        return np.asarray(rows, dtype=np.float64)

    def fit(self, trials: Sequence[Trial]) -> Floats:
        """Return the constants that make log((cost + FLOOR) / (foretold + FLOOR)) small; few far off count little."""
        values, cost, weights = self.values(trials), costs(trials), _by_task(trials)

        def off(logs: Floats) -> Floats:
            return weights * np.log((cost + FLOOR) / (values @ np.exp(logs) + FLOOR))

        bounds = (np.full(len(self.terms), -12.0), np.full(len(self.terms), 12.0))
        best = min(
            (least_squares(off, np.full(len(self.terms), start), loss="soft_l1", f_scale=0.5, bounds=bounds)
             for start in (-3.0, 0.0, 2.0)),
            key=lambda found: found.cost,
        )  # fmt: skip
        return np.asarray(np.exp(best.x), dtype=np.float64)

    def errors(self, trials: Sequence[Trial]) -> dict[str, Floats]:
        """Return task -> log2 of (cost + FLOOR) / (foretold + FLOOR), foretold from the other tasks alone."""
        found = {}
        for task in tasks_of(trials):
            others, own = [t for t in trials if t["task"] != task], [t for t in trials if t["task"] == task]
            foretold = self.values(own) @ self.fit(others)
            found[task] = np.log2((costs(own) + FLOOR) / (foretold + FLOOR))
        return found


def costs(trials: Sequence[Trial]) -> Floats:
    return np.array([max(lasting(t), 0.0) for t in trials], dtype=np.float64)


def _by_task(trials: Sequence[Trial]) -> Floats:
    """Return weights by which every task counts alike."""
    counts = Counter(t["task"] for t in trials)
    return np.array([(len(trials) / len(counts) / counts[t["task"]]) ** 0.5 for t in trials])


# ---------------------------------------------------------------------- the formulas that were tried


def of(name: str) -> Term:
    """Return a known quantity as a term."""
    return KNOWN[name]


def rate_left(trial: Trial) -> float:
    """Return the learning rate of all further steps as a share of the whole run's."""
    return float(trial["rate_left"])


def capacity(later: Term, *, by_outputs: bool = True) -> Term:
    """Return what is to come, times the share of the multiply-adds that is gone.

    by_outputs: times the geometric mean of that share and of the relative rms of the outputs, which counts up to 1.
    """

    def term(trial: Trial) -> float:
        share = 1 - float(trial["macs_left"])
        rms = min(float(trial["at_once"]["rms_squared"]) ** 0.5, 1.0)
        return ((share * rms) ** 0.5 if by_outputs else share) * _number(later(trial))

    return term


DIVERGENCE = of("divergence of the outputs")
FORMULAS = (
    Formula(name="divergence", terms=(DIVERGENCE,)),
    Formula(name="squared relative rms of the outputs", terms=(of("squared relative rms of the outputs"),)),
    Formula(name="change of the training loss", terms=(of("training loss, change"),)),
    Formula(name="relative error squared", terms=(of("relative error squared"),)),
    Formula(name="gradient-weighted error, absolute", terms=(of("gradient-weighted error, absolute"),)),
    Formula(name="multiply-adds", terms=(of("share of the multiply-adds removed"),)),
    Formula(name="divergence; multiply-adds x rate left", terms=(DIVERGENCE, capacity(rate_left, by_outputs=False))),
    Formula(name="divergence; √(multiply-adds x rms) x rate left", terms=(DIVERGENCE, capacity(rate_left))),
)
CHOSEN = FORMULAS[-1]  # that apoptosis.decide.exchange has


def fitted(record: Trial) -> list[Trial]:
    """Return the trials that formulas are fitted to: removals of groups that were followed to the end of the run."""
    return [t for t in made(record["trials"]) if t["what"] in ("group", "all") and to_end(t)]


def rank_of(formula: Formula, trials: Sequence[Trial]) -> dict[str, float]:
    """Return task -> Spearman's rank correlation of a formula, fitted to the other tasks, with what lasts."""
    found = {}
    for task in tasks_of(trials):
        others, own = [t for t in trials if t["task"] != task], [t for t in trials if t["task"] == task]
        if len(own) >= FEWEST and others:
            foretold = formula.values(own) @ formula.fit(others)
            found[task] = float(spearmanr(foretold, [lasting(t) for t in own])[0])
    return found
