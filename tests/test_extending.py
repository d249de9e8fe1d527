"""What one change touches: one of everything is added to a copy of the package, at the places docs/extending.md lists.

Every check runs in the copy, where it passes, and in the package as it is, where it fails: else it would show nothing.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import apoptosis

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "extending.md"
SOURCE = Path(apoptosis.__file__).parent
CHECKS = Path(__file__).parent / "extending_checks.py"


@dataclass(frozen=True, kw_only=True)
class Place:
    """A text that is added to a file of the package, behind the line that matches `behind`; at the end for ""."""

    file: str
    text: str
    behind: str = ""


ADDED: dict[str, tuple[Place, ...]] = {
    "operator": (
        Place(
            file="graph/rules/table.py",
            text='    ("special_airy_ai", _elementwise()),\n',
            behind=r"^_ROWS: .*\($",
        ),
    ),
    "module type with attributes": (
        Place(
            file="surgery/attributes.py",
            text='    nn.LocalResponseNorm: _weight("size"),\n',
            behind=r"^ATTRIBUTES: .*\{$",
        ),
    ),
    "neuron type": (
        Place(
            file="numerics/activations.py",
            text='    _entry("sphere", "", torch.special.spherical_bessel_j0, 0.44, Symmetry(), '
            'operators=("special_spherical_bessel_j0",)),\n',
            behind=r"^_BUILT_IN: .*\($|^_BUILT_IN = \($",
        ),
    ),
    "optimizer": (
        Place(
            file="surgery/optimizers.py",
            text='    "HeavyBall": StateRules({"velocity": "first"}),\n',
            behind=r"^OPTIMIZERS: .*\{$",
        ),
    ),
    "criterion": (
        Place(file="criteria/registry.py", text="\nregister_criterion(replace(MAGNITUDE, name='largest'))\n"),
    ),
    "norm over channels": (
        Place(
            file="modules/norms.py",
            text="\n\nclass Damped(nn.Module):\n"
            "    def __init__(self, width):\n        super().__init__()\n"
            "        self.size, self.weight = width, nn.Parameter(torch.ones(width))\n\n"
            "    def forward(self, x):\n"
            "        return x / (1.0 + x.square().mean(-1, keepdim=True)) * self.weight\n\n\n"
            "class ShrunkDamped(_Compensated, Damped):\n"
            "    def forward(self, x):\n"
            "        _, square, cross = self._sums(x)\n"
            "        total = (x * (x * square + 2.0 * cross)).sum(-1, keepdim=True) + self.constant_square\n"
            "        return x / (1.0 + total / self.full_width) * self.weight\n\n\n"
            "SHRUNK[Damped] = ShrunkDamped\n",
        ),
        Place(
            file="surgery/attributes.py",
            text='    "apoptosis.modules.norms.Damped": _weight("size"),\n',
            behind=r"^ATTRIBUTES: .*\{$",
        ),
    ),
    "wrapper": (
        Place(
            file="distributed/boxed.py",
            text="from apoptosis.distributed.protocol import Wrapper, register_wrapper\n\n\n"
            "class Boxed(Wrapper):\n    name = 'Boxed'\n\n"
            "    def matches(self, candidate):\n        return type(candidate).__name__ == 'Box'\n\n"
            "    def unwrap(self, wrapped):\n        return wrapped.inside\n\n"
            "    def rebuild(self, wrapped, layout=None):\n        wrapped.set_up()\n\n\n"
            "register_wrapper(Boxed())\n",
        ),
    ),
    "report plot": (
        Place(
            file="tools/report/figures.py",
            text="\n\n@plot('steps', 'Steps', 'Nothing but a title.')\n"
            "def _steps(run: RunData) -> Drawn | str:\n    return 'The log has no steps.'\n",
        ),
    ),
    "data set of the command": (
        Place(
            file="tools/recipes/datasets/__init__.py",
            text="    Recipe(name='half', num_classes=10,\n"
            "           read=lambda *of: tuple(p.rows(0, len(p) // 2) for p in digits.RECIPE.read(*of))),\n",
            behind=r"^_RECIPES.* = \($",
        ),
    ),
    "network of the command": (
        Place(
            file="tools/recipes/networks.py",
            text="\n\n@network(16, images=False)\n"
            "def narrow(design: Design) -> nn.Sequential:\n    return mlp(design)\n",
        ),
    ),
}


def documented() -> dict[str, tuple[int, tuple[str, ...]]]:
    """The table of the page: what is added -> number of places, and the files."""
    rows = re.findall(r"^\| (?!what|---)([^|]+) \| (\d+) \| ([^|]+) \|", PAGE.read_text().split("## Places")[1], re.M)
    return {what: (int(number), tuple(re.findall(r"`([\w/.]+)`", files))) for what, number, files in rows}


def grown(folder: Path) -> Path:
    """A copy of the package with everything added."""
    copy = folder / "apoptosis"
    shutil.copytree(SOURCE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    for place in (place for places in ADDED.values() for place in places):
        path = copy / place.file
        text = path.read_text() if path.exists() else ""
        if place.behind:
            found = list(re.finditer(place.behind, text, re.M))
            assert len(found) == 1, f"{place.file}: {len(found)} lines match {place.behind}"
            end = found[0].end() + 1
            text = text[:end] + place.text + text[end:]
        else:
            text += place.text
        path.write_text(text)
    return folder


def checked(path: Path, home: Path) -> dict[str, str]:
    """What the checks say with the package of a folder: kind -> "" or the error."""
    env = {**os.environ, "PYTHONPATH": str(path), "HOME": str(home)}
    done = subprocess.run([sys.executable, str(CHECKS)], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_the_page_lists_the_places() -> None:
    def shown(place: Place) -> str:
        return place.file if (SOURCE / place.file).exists() else f"{Path(place.file).parent}/"

    assert {what: (len(places), tuple(map(shown, places))) for what, places in ADDED.items()} == documented()


def test_one_of_each(tmp_path: Path) -> None:
    found = checked(grown(tmp_path), tmp_path)
    assert found == dict.fromkeys(ADDED, "")


@pytest.mark.parametrize("what", ADDED)
def test_without_it_the_check_fails(what: str, unchanged: dict[str, str]) -> None:
    assert unchanged[what]


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return checked(SOURCE.parent, tmp_path_factory.mktemp("home"))
