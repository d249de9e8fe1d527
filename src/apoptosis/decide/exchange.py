"""What a removal costs in the long run, in nats of training loss at the end, and whether that is too much for it.

Holds: the formula, fitted to experiments, and the rate at which it is set against what is saved. Elsewhere: the
experiments (benchmarks/aftermath; docs/method.md has them and the formula's error), what a removal saves (overhead,
policy).
"""

from __future__ import annotations

import math

from apoptosis.errors import ArgumentError

AT_ONCE = 1.3  # of the divergence at once
CAPACITY = 0.08  # nats that a run would lose with the whole network, from its first step
RATE = 0.02  # nats that saving the whole network's multiply-adds may cost, where nobody has said what may be lost
SURE_SHARE = 0.25  # of the multiply-adds: a network that loses so much at once within the tolerance is far too wide


def lasting_cost(divergence: float, rms: float, *, saved: float, rate_left: float) -> float:
    """Return by how much the loss at the end of the run is expected to be higher because of a removal, in nats.

        cost = AT_ONCE * divergence + CAPACITY * sqrt(saved * min(rms, 1)) * rate_left

    The first part is what the outputs lose now. The second is what the smaller network will not learn any more, which
    does not show yet: early in a run it is by far the larger one. Typical errors are in docs/method.md; an order of
    groups of one network is foretold better than the size of a cost.

    Args:
        divergence: mean Kullback-Leibler divergence of the predictions after the removal from those before, on recent
            training batches, nats, >= 0. Of several groups: the sum.
        rms: root mean square change of the logits (less each prediction's mean) over that of their spread over the
            batch, >= 0. Of several groups: the root of the sum of squares.
        saved: share of the network's multiply-adds that goes, 0..1. Of several groups: the sum.
        rate_left: sum of the learning rates of all further steps over that of all steps of the run, 0..1.

    Both changes are measured with the statistics of the batches where there are batch norms, not with running ones, and
    without dropout.

    Raises: ArgumentError: an argument is not in its range.

    Example:
        >>> round(lasting_cost(0.003, 0.077, saved=0.47, rate_left=0.82), 4)
        0.0164
    """
    sizes = {"divergence": divergence, "rms": rms}
    shares = {"saved": saved, "rate_left": rate_left}
    wrong = [f"{name}={value!r}" for name, value in sizes.items() if not 0 <= value < math.inf]
    wrong += [f"{name}={value!r}" for name, value in shares.items() if not 0 <= value <= 1]
    if wrong:
        raise ArgumentError(
            f"lasting_cost: {', '.join(wrong)}; divergence and rms are at least 0 and finite, saved and rate_left are "
            "shares in 0..1."
        )
    return AT_ONCE * divergence + CAPACITY * math.sqrt(saved * min(rms, 1.0)) * rate_left


def too_dear(rms: float, *, saved: float, left: float) -> str:
    """Say why an event is not worth what it is expected to cost in the long run, "" if it is.

    The loss at once is left out: it is measured by itself (the sanity limit), and small within a tolerance. What counts
    here is what the smaller network would not learn any more.

    Args: rms: as in `lasting_cost`. saved: share of the multiply-adds. left: share of the run that is left, which
    stands for the rates left, because schedules of rates are not known.

    Example:
        >>> too_dear(0.005, saved=0.08, left=0.95), too_dear(0.03, saved=0.6, left=0.95)
        ('', '')
        >>> print(too_dear(0.013, saved=0.1, left=0.85))  # doctest: +ELLIPSIS
        it would save 10 % of the multiply-adds and is expected to cost 0.00245 nats of loss at the end of the run, ...
    """
    if saved >= SURE_SHARE:
        return ""
    cost = lasting_cost(0.0, rms, saved=max(saved, 0.0), rate_left=left)
    if cost <= RATE * saved:
        return ""
    return (
        f"it would save {100 * saved:.3g} % of the multiply-adds and is expected to cost {cost:.3g} nats of loss at "
        f"the end of the run, more than {RATE:g} nats times that share"
    )
