"""The networks that torch's own tests of structured pruning use, which ship inside torch."""

from __future__ import annotations

import torch
from torch.testing._internal import common_pruning as shipped

from families.classic import images, vectors
from families.family import Family

LINEAR = {"seq.0": 1, "seq.1": 2}
PINNED = "the network returns states of one layer, and all layers of a recurrence share one width"
CONVOLUTIONS = {"seq.0": 8, "conv2d1": 16}

FAMILIES = (
    Family(
        name="torch: SimpleLinear",
        build=shipped.SimpleLinear,
        example=vectors(7),
        groups={**LINEAR, "seq.2": 1, "linear1": 1},
    ),
    Family(
        name="torch: LinearBias",
        build=shipped.LinearBias,
        example=vectors(7),
        groups={**LINEAR, "seq.2": 1, "seq.3": 1},
    ),
    Family(
        name="torch: LinearActivation",
        build=shipped.LinearActivation,
        example=vectors(7),
        groups={"seq.0": 1, "seq.2": 2, "seq.4": 1, "linear1": 1},
    ),
    Family(
        name="torch: LinearActivationFunctional",
        build=shipped.LinearActivationFunctional,
        example=vectors(7),
        groups={"seq.0": 1, "seq.2": 2, "seq.4": 1, "linear1": 1, "linear2": 2},
    ),
    Family(
        name="torch: SimpleConv2d",
        build=shipped.SimpleConv2d,
        example=images(1, 10),
        groups={**CONVOLUTIONS, "seq.1": 16},
    ),
    Family(
        name="torch: Conv2dBias",
        build=shipped.Conv2dBias,
        example=images(1, 12),
        groups={**CONVOLUTIONS, "seq.1": 8, "seq.2": 16},
    ),
    Family(
        name="torch: Conv2dActivation",
        build=shipped.Conv2dActivation,
        example=images(1, 12),
        groups={**CONVOLUTIONS, "seq.2": 16, "seq.4": 16},
        batches=4,
    ),
    Family(
        name="torch: Conv2dPadBias",
        build=shipped.Conv2dPadBias,
        example=images(1, 8),
        groups={**CONVOLUTIONS, "seq.2": 8, "seq.4": 8, "seq.6": 8, "seq.8": 16},
    ),
    Family(
        name="torch: Conv2dPool",
        build=shipped.Conv2dPool,
        example=images(1, 12),
        groups={**CONVOLUTIONS, "seq.3": 16, "conv2d2": 16},
    ),
    Family(
        name="torch: Conv2dPoolFlattenFunctional",
        build=shipped.Conv2dPoolFlattenFunctional,
        example=images(1, 10),
        groups={"seq.0": 1, "seq.3": 1, "conv2d1": 2, "conv2d2": 3},
    ),
    Family(
        name="torch: Conv2dPoolFlatten",
        build=shipped.Conv2dPoolFlatten,
        example=images(1, 10),
        groups={"seq.0": 1, "seq.3": 1, "conv2d1": 2, "conv2d2": 3},
    ),
    Family(
        name="torch: LSTMLinearModel",
        build=lambda: shipped.LSTMLinearModel(6, 8, 4, 2),
        example=lambda rows: torch.randn(4, rows, 6),
        groups={"lstm": 2},
        missing={"lstm": PINNED},
    ),
    Family(
        name="torch: LSTMLayerNormLinearModel",
        build=lambda: shipped.LSTMLayerNormLinearModel(6, 8, 4, 2),
        example=lambda rows: torch.randn(4, rows, 6),
        groups={"lstm": 2},
        missing={"lstm": PINNED},
    ),
)
