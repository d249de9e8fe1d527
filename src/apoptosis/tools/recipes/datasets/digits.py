"""Scikit-learn's handwritten digits: 1797 grey images of 8x8 that come with the package, so no network is needed.

Holds: the split, and the enlargement of the *training* part by small shifts and rotations, so that an epoch takes
long enough to be timed. Validation and test images are split off before, and stay as they are.
Reference: Alpaydin, Kaynak, "Optical recognition of handwritten digits", UCI Machine Learning Repository, 1998.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from apoptosis.tools.recipes.datasets.parts import Part, Recipe

SPLIT_SEED = 0
TEST_SHARE = 0.2
ENLARGED_ROWS = 40_000
MAX_ANGLE = math.radians(15)
MAX_SHIFT = 1.0


def load_digits() -> tuple[Part, Part]:
    """Training part (not enlarged) and test part, shuffled once: the file is ordered by writer.

    Example:
        >>> train, test = load_digits()
        >>> len(train), len(test), tuple(train.inputs.shape[1:])
        (1438, 359, (1, 8, 8))
    """
    from sklearn.datasets import load_digits as bundled

    bunch = bundled()
    images = torch.from_numpy(bunch.images).to(torch.float32)[:, None]
    labels = torch.from_numpy(bunch.target).to(torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED), device="cpu")
    part = Part(inputs=images[order], labels=labels[order])
    num_test = round(len(part) * TEST_SHARE)
    return part.rows(0, len(part) - num_test), part.rows(len(part) - num_test, len(part))


def enlarge(part: Part, num_rows: int, seed: int = SPLIT_SEED) -> Part:
    """Append copies of the images, each turned by up to 15 degrees and moved by up to one pixel.

    Args:
        part: images (rows, 1, height, width), float32.
        num_rows: how many rows the result has.
        seed: of the shifts and rotations.
    """
    if num_rows <= len(part):
        return part.rows(0, num_rows)
    generator = torch.Generator().manual_seed(seed)
    source = torch.arange(num_rows - len(part), device="cpu") % len(part)
    moved = move(part.inputs[source], generator)
    return Part(inputs=torch.cat([part.inputs, moved]), labels=torch.cat([part.labels, part.labels[source]]))


def move(images: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate and shift every image by its own random amount, bilinearly; what comes in from outside is 0.

    Args:
        images: (rows, planes, height, width), float32.
        generator: decides angles (uniform, +-15 degrees) and shifts (uniform, +-1 pixel).
    """
    rows, _, height, width = images.shape
    angle = (torch.rand(rows, generator=generator, dtype=torch.float32, device="cpu") * 2 - 1) * MAX_ANGLE
    shift = (torch.rand(rows, 2, generator=generator, dtype=torch.float32, device="cpu") * 2 - 1) * MAX_SHIFT
    cos, sin = angle.cos(), angle.sin()
    # affine_grid's coordinates span 2 over the image, hence 2 / size per pixel.
    theta = torch.stack(
        [torch.stack([cos, -sin, shift[:, 0] * 2 / width], 1), torch.stack([sin, cos, shift[:, 1] * 2 / height], 1)], 1
    )
    grid = torch.nn.functional.affine_grid(theta, list(images.shape), align_corners=False)
    return torch.nn.functional.grid_sample(images, grid, align_corners=False)


RECIPE = Recipe(
    name="digits",
    read=lambda folder, test_rows: load_digits(),
    num_classes=10,
    enlarge=lambda part, num_rows: enlarge(part, num_rows or ENLARGED_ROWS),
)
