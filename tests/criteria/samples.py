"""Random numbers and their moments, for the tests of criteria."""

import torch

from apoptosis.numerics.moments import Moments


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments_of(z: torch.Tensor) -> Moments:
    moments = Moments(z.shape[1])
    moments.update(z, exact=True)
    return moments
