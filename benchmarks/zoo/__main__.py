"""Measure what may shrink in one network of each of timm's modules and every model type of transformers.

    python -m benchmarks.zoo                            all of them: benchmarks/results/zoo.json and docs/coverage.md
    python -m benchmarks.zoo --families timm            one of the two families; the other's rows stay as they are
    python -m benchmarks.zoo --only resnet18,bert       these rows alone
    python -m benchmarks.zoo --resume                   go on with a run that was interrupted, of the same code
    python -m benchmarks.zoo --page                     make the page again from the JSON

Holds: the command. It needs the extra `zoo`: pip install 'torch-apoptosis[zoo]'.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarks import shared
from benchmarks.zoo.measure import measure
from benchmarks.zoo.page import PAGE, RESULTS, ROOT, summary, write_page
from benchmarks.zoo.runs import SEED, Log, merged, record
from benchmarks.zoo.workers import rows

FAMILIES = ("timm", "transformers")


def family_module(family: str) -> ModuleType:
    """timm_networks or transformers_networks."""
    return importlib.import_module(f"benchmarks.zoo.{family}_networks")


def one(family: str, name: str) -> dict[str, Any]:
    """The row of one network; whatever is raised becomes its error."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    start = time.process_time()
    try:
        return measure(partial(family_module(family).candidates, name))
    except Exception as error:  # noqa: BLE001 - one row, not the run
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]} ({where.name}:{where.lineno})"
        inside = any(
            os.sep + "apoptosis" + os.sep in frame.filename for frame in traceback.extract_tb(error.__traceback__)
        )
        return {"built": inside, "captured": False, "error": text[:300], "seconds": time.process_time() - start}


def tasks(families: Sequence[str], only: Sequence[str]) -> dict[tuple[str, str], str]:
    """(family, network) -> its module; the libraries are loaded, so that forked processes have them.

    Raises: SystemExit: a library is missing, or a name is unknown.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # some configurations ask for a file when they are made
    found: dict[tuple[str, str], str] = {}
    for family in families:
        module = family_module(family)
        try:
            found.update({(family, name): kind for name, kind in module.networks().items()})
        except ImportError as error:
            raise SystemExit(f"{module.MISSING} ({error})") from error
    if "transformers" in families:
        for name in ("modeling_utils", "modeling_outputs", "cache_utils", "masking_utils"):
            importlib.import_module(f"transformers.{name}")
    unknown = [name for name in only if all(name != known for _, known in found)]
    if unknown:
        raise SystemExit(f"--only: unknown {', '.join(unknown)}; there are {len(found)}, e.g. {next(iter(found))[1]}")
    return {key: kind for key, kind in found.items() if not only or key[1] in only}


def run(wanted: Mapping[tuple[str, str], str], known: Mapping[str, Any], given: argparse.Namespace) -> dict[str, Any]:
    """Measure; rows of `known` that are not wanted stay."""
    log = Log(given.json.with_suffix(".unfinished"), record(given.processes, given.limit), resume=given.resume)
    done = {(family, name) for family, name, _ in log.rows}
    for family, name, row in rows(one, [key for key in wanted if key not in done], given.processes, given.limit):
        row["module"] = wanted[family, name]
        log.add(family, name, row)
        print(f"{family} {name}: {summary_line(row)}", flush=True)
    stay = dict(known.get("families", {}))
    if not given.only:
        stay.update({family: {} for family in given.families})
    result = merged({**known, "families": stay}, log.run | {"seconds": log.seconds}, log.rows)
    shared.write(given.json, result)
    log.close()
    return result


def summary_line(row: Mapping[str, Any]) -> str:
    """One line about a row."""
    if not row["built"]:
        return f"not built: {row.get('error', '')}"
    if not row["captured"]:
        return f"NOT CAPTURED: {row['error']}"
    if row["share"] is None:
        return "no multiply-adds"
    pins = "; ".join(
        f"{100 * p['share']:.0f} % {why}" for why, p in list(row["pins"].items())[:3] if p["share"] > 0.005
    )
    return f"{row['share']:.3f} in {row['seconds']:.1f} s{'' if row['fake'] else ', real tensors'}; {pins}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default=",".join(FAMILIES), help="timm, transformers or both, comma-separated")
    parser.add_argument("--only", default="", help="names of networks or model types, comma-separated")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--limit", type=float, default=15.0, help="processor seconds for one network")
    parser.add_argument("--resume", action="store_true", help="keep the rows of a run that was interrupted")
    parser.add_argument("--page", action="store_true", help="no measuring")
    parser.add_argument("--json", type=Path, default=RESULTS, help="write the figures there; the page only by default")
    given = parser.parse_args()
    given.families = [name for name in given.families.split(",") if name]
    given.only = [name for name in given.only.split(",") if name]
    if set(given.families) - set(FAMILIES):
        parser.error(f"--families: {', '.join(FAMILIES)}")
    if not given.page:
        torch.set_num_threads(1)
        known = json.loads(given.json.read_text(encoding="utf-8")) if given.json.exists() else {}
        print(summary(run(tasks(given.families, given.only), known, given)))
    if given.json == RESULTS:
        write_page()
        print(f"wrote {PAGE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
