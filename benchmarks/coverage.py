"""Measure what is removable in every family of networks, and make docs/coverage.md from the figures.

    python -m benchmarks.coverage              measure, write benchmarks/results/coverage.json and the page
    python -m benchmarks.coverage --page       make the page again from the JSON
    python -m benchmarks.coverage --check      exit status 1 if the page does not say what the JSON says

The page ends with what benchmarks/zoo measures.

The families are those of tests/families: small random networks, redundancy planted in the groups that are listed there,
removed at tolerance 0 in float32 and float64. A second, fresh network is shrunk once at tolerance 0.05 on random data.
Holds: this measurement and its page. Elsewhere: what must hold (tests/families/oracle.py).
"""

from __future__ import annotations

import json
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from apoptosis import shrink_
from apoptosis.records import Group, Pin
from benchmarks import shared
from benchmarks.zoo import page as zoo

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from families.family import Family  # noqa: E402 - families lies in tests/, which is put on the path above
from families.oracle import build, difference, inputs, operate, run, structure_of  # noqa: E402 - likewise

RESULTS, PAGE = ROOT / "benchmarks" / "results" / "coverage.json", ROOT / "docs" / "coverage.md"
SEED, TOLERANCE = 0, 0.05
HEAD = ("family", "channels", "removable", "planted, found", "pinned channels: why", "error of an exact removal",
        f"multiply-adds at tolerance {TOLERANCE:g}")  # fmt: skip
TEXT = f"""# Coverage

The small networks of the tests first, then [networks of timm and transformers](#networks-of-timm-and-transformers).

What is removable in small random networks of many families, made from
[benchmarks/results/coverage.json](../benchmarks/results/coverage.json), which `python -m benchmarks.coverage` measures.

- *Channels*: of all coupled channel groups, the network's outputs included. *Removable*: those of groups that are not
  pinned; whole heads are not counted in addition to the channels inside them.
- *Planted, found*: channels made exactly redundant (duplicates, multiples, negatives, zeros), and how many of them went
  at tolerance 0; more may go than were planted, which is not counted here.
- *Error of an exact removal*: relative change of the outputs in evaluation mode, in float64 and in float32, on inputs
  that were not used.
- *Multiply-adds at tolerance {TOLERANCE:g}*: what is left of a fresh random network after one surgery on random data.
  A random network has little to lose; this says that the machinery runs, not what training makes redundant.
- Pins speak of these small configurations; "output" stands for the network's outputs.

"""


def measure(family: Family) -> dict[str, Any]:
    """All figures of one family."""
    start = time.perf_counter()
    errors: dict[str, float] = {}
    for dtype in (torch.float64, torch.float32):
        operation = operate(family, dtype, SEED)
        x = inputs(family, dtype, 77)
        with torch.no_grad():
            expected, found = (run(family, model, x) for model in (operation.before, operation.after))
        errors[str(dtype).removeprefix("torch.")] = difference(found, expected)
        if dtype == torch.float64:
            planted = sum(operation.planted.values())
            went = sum(min(num, -_change(operation.event.groups.get(name))) for name, num in operation.planted.items())
    model, example = build(family, torch.float32, SEED), inputs(family, torch.float32, SEED, rows=4)
    groups = [g for g in structure_of(family, model, example).groups if not g.name.endswith(":heads")]
    batches = [inputs(family, torch.float32, 1 + i) for i in range(family.batches)]
    event = shrink_(model, example, batches, tolerance=TOLERANCE, align=1, norm_widths=family.norm_widths)
    return {
        "channels": sum(g.num_channels for g in groups),
        "removable": sum(g.num_channels for g in groups if g.pin is None),
        "groups": {g.name: _group_record(g) for g in groups},
        "listed": dict(family.groups),
        "planted": planted,
        "found": went,
        "not_planted": dict(operation.not_planted),
        "missing": dict(family.missing),
        "errors": errors,
        "macs": list(event.macs),
        "parameters": list(event.parameters),
        "seconds": time.perf_counter() - start,
    }


def shrunk_lists(old: Mapping[str, Any], families: Mapping[str, Family]) -> list[str]:
    """What the committed figures list and the families do not any more: lists may only grow.

    Args:
        old: the committed figures by family. families: as they are now; those whose extra is missing are passed over.
    """
    lost = []
    for name in old.keys() & families.keys():
        now, then = families[name], old[name]
        lost += [f"{name}: '{g}' is not listed" for g, num in then["listed"].items() if now.groups.get(g, 0) < num]
        known = set(then["missing"]) | set(now.groups) - set(then["listed"])
        lost += [f"{name}: '{g}' was removable" for g in now.missing if g not in known]
    return lost


def _change(widths: tuple[int, int] | None) -> int:
    return 0 if widths is None else widths[1] - widths[0]


def _group_record(group: Group) -> dict[str, Any]:
    return {"channels": group.num_channels, "pin": None if group.pin is None else shortened(group.pin)}


def shortened(pin: Pin) -> str:
    """The operator and what it does, without names and places."""
    text = re.sub(r"^they are the network's output.*", "output", pin.reason)
    text = re.sub(r"operator aten\.(\w+)( in '[^']*')?", r"\1", text)
    text = re.sub(r" in '[^']*'|'[^']*' ", " ", text)
    return re.sub(r"\s+", " ", text.replace("aten.", "")).strip().rstrip(".").partition(": ")[0]


def page(result: Mapping[str, Any]) -> str:
    """The page, from the JSON alone."""
    rows = [_row(name, record) for name, record in result["families"].items()]
    where = result["machine"]
    made = f"Seed {result['seed']}, torch {result['versions']['torch']}, {where['system']}, {where['threads']} thread."
    networks = f"\n{zoo.part(zoo.read())}" if zoo.RESULTS.exists() else ""
    return f"{TEXT}{_table(HEAD, rows)}\n\n{made}\n{networks}"


def _row(name: str, record: Mapping[str, Any]) -> tuple[str, ...]:
    pins: Counter[str] = Counter()
    for group in record["groups"].values():
        if group["pin"] is not None:
            pins[group["pin"]] += group["channels"]
    before, after = record["macs"]
    errors = record["errors"]
    return (
        name,
        str(record["channels"]),
        f"{100 * record['removable'] / record['channels']:.0f} %",
        f"{record['planted']}, {record['found']}",
        "; ".join(f"{num}: {reason}" for reason, num in pins.items()) or "none",
        f"{errors['float64']:.0e}, {errors['float32']:.0e}",
        f"{100 * after / before:.0f} %" if before else "none counted",
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def main() -> int:
    parser = shared.parser(__doc__)
    parser.add_argument("--page", action="store_true", help="no measuring")
    parser.add_argument("--check", action="store_true", help="no measuring, no writing")
    given = parser.parse_args()
    if not (given.page or given.check):
        shared.write(RESULTS, collect())
    text = page(read())
    if given.check:
        return int(PAGE.read_text(encoding="utf-8") != text)
    PAGE.write_text(text, encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")
    return 0


def read() -> dict[str, Any]:
    """The committed figures."""
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def collect() -> dict[str, Any]:
    """Measure every family."""
    from families.registry import FAMILIES

    if RESULTS.exists() and (lost := shrunk_lists(read()["families"], FAMILIES)):
        raise SystemExit("lists may only grow: " + "; ".join(lost))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    families: dict[str, Any] = {}
    for name, family in FAMILIES.items():
        families[name] = record = measure(family)
        print(f"{name}: {record['seconds']:.1f} s", flush=True)
    return shared.result("coverage", seed=SEED, tolerance=TOLERANCE, families=families)


if __name__ == "__main__":
    sys.exit(main())
