"""What a removal costs in the long run, in nats of training loss at the end: a formula fitted to experiments.

Holds: the formula with its constants, and a forecast of what a run has still to gain. Elsewhere: the experiments
(benchmarks/aftermath; docs/method.md has them with the formula's error), what a removal saves (overhead, policy).
"""

from __future__ import annotations

import math

from apoptosis.errors import ArgumentError

AT_ONCE = 1.3  # part of the divergence at once that is there at the end, where no learning rate is left to undo it
CAPACITY = 0.25  # part of what is still to be gained that goes with the whole network


def lasting_cost(divergence: float, rms: float, *, saved: float, rate_left: float, to_come: float) -> float:
    """Return by how much the loss at the end of the run is expected to be higher because of a removal, in nats.

        cost = AT_ONCE * divergence * (1 - rate_left)^2 + CAPACITY * sqrt(saved * min(rms, 1)) * to_come

    The first part is what the outputs lose now: early in a run all of it is learnt again, at the end all of it stays.
    The second is what the smaller network will not learn any more, which does not show yet. Typical errors are in
    docs/method.md; an order of groups of one network is foretold better than the size of a cost.

    Args:
        divergence: mean Kullback-Leibler divergence of the predictions after the removal from those before, on recent
            training batches, nats, >= 0. Of several groups: the sum.
        rms: root mean square change of the logits (less each prediction's mean) over that of their spread over the
            batch, >= 0. Of several groups: the root of the sum of squares.
        saved: share of the network's multiply-adds that goes, 0..1. Of several groups: the sum.
        rate_left: sum of the learning rates of all further steps over that of all steps of the run, 0..1.
        to_come: by how much the loss is expected to fall until the end of the run, nats, >= 0 (`gain_to_come`).

    Raises: ArgumentError: an argument is not in its range.

    Example:
        >>> round(lasting_cost(0.003, 0.077, saved=0.47, rate_left=0.82, to_come=0.9), 4)
        0.0429
    """
    sizes = {"divergence": divergence, "rms": rms, "to_come": to_come}
    shares = {"saved": saved, "rate_left": rate_left}
    wrong = [f"{name}={value!r}" for name, value in sizes.items() if not 0 <= value < math.inf]
    wrong += [f"{name}={value!r}" for name, value in shares.items() if not 0 <= value <= 1]
    if wrong:
        raise ArgumentError(
            f"lasting_cost: {', '.join(wrong)}; divergence, rms and to_come are at least 0 and finite, saved and "
            "rate_left are shares in 0..1."
        )
    now = AT_ONCE * divergence * (1.0 - rate_left) ** 2
    return now + CAPACITY * math.sqrt(saved * min(rms, 1.0)) * to_come


def gain_to_come(then: float, now: float, *, step: int, total_steps: int) -> float:
    """Return by how much the loss is expected to fall until the end of the run, in the loss's own unit, >= 0.

    Losses fall about as much with every doubling of the steps, so what the last doubling gained is what each further
    one will gain: (then - now) * log2(total_steps / step). Curves flatten, so less will come, about half of it in the
    experiments; `CAPACITY` was fitted to this forecast.

    Args:
        then: training loss around half of the steps done so far, averaged over enough steps to be steady.
        now: training loss of the last steps, averaged likewise.
        step: steps done, >= 1.
        total_steps: of the run, at least `step`.

    Raises: ArgumentError: the steps are not in this order, or a loss is not finite.

    Example:
        >>> gain_to_come(2.0, 1.75, step=100, total_steps=400)
        0.5
    """
    if not (1 <= step <= total_steps and math.isfinite(then) and math.isfinite(now)):
        raise ArgumentError(
            f"gain_to_come: then={then!r} and now={now!r} must be finite, and 1 <= step={step} <= "
            f"total_steps={total_steps}."
        )
    return max(then - now, 0.0) * math.log2(total_steps / step)
