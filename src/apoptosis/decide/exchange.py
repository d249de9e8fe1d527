"""What a removal costs in the long run, in nats of training loss at the end: a formula fitted to experiments.

Holds: the formula with its constants. Elsewhere: the experiments (benchmarks/aftermath; docs/method.md has them and the
formula's error), what a removal saves (overhead, policy).
"""

from __future__ import annotations

import math

from apoptosis.errors import ArgumentError

AT_ONCE = 1.3  # of the divergence at once
CAPACITY = 0.08  # nats that a run would lose with the whole network, from its first step


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
