"""The honest rival: a network trained from scratch at the widths that apoptosis found, in the same run.

    python benchmarks/rivals.py --row fashion-mnist --data-dir DIR

Per seed: the twins of `apoptosis compare`, epoch by epoch in turn, then the rival on the same batches. The rival needs
the widths, which only the run before it found; what finding them by search would cost is not counted against it.
Lives here: this comparison. Does not live here: training (recipes), tables (table.py).
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from apoptosis.recipes.config import RunConfig
from apoptosis.recipes.folder import write_json
from apoptosis.recipes.loop import Trainer
from apoptosis.recipes.machine import machine, versions
from apoptosis.recipes.results import Result, finish
from apoptosis.recipes.train import prepare
from run_figures import COMMON, RESULTS, ROWS, SEEDS


def run(config: RunConfig) -> dict[str, Any]:
    """Twins, then the rival."""
    data, device = prepare(config)
    twins = {
        name: Trainer(config.model_copy(update={"apoptosis": name == "apoptosis"}), data, device)
        for name in ("dense", "apoptosis")
    }
    epochs: dict[str, list[Any]] = {name: [] for name in (*twins, "rival")}
    for number in range(config.epochs):
        names = list(twins) if (number + config.seed) % 2 == 0 else list(twins)[::-1]
        for name in names:
            epochs[name].append(twins[name].run_epoch())
    widths = tuple(twins["apoptosis"].widths().values())
    if config.network not in ("mlp", "cnn") or config.widths is None or len(widths) != len(config.widths):
        raise SystemExit(
            f"{config.network}: its groups are not its --widths one by one; no rival can be built from them"
        )
    rival = Trainer(config.model_copy(update={"apoptosis": False, "widths": widths}), data, device)
    epochs["rival"] = [rival.run_epoch() for _ in range(config.epochs)]
    results = {name: _plain(finish(t, epochs[name])) for name, t in (*twins.items(), ("rival", rival))}
    return {"seed": config.seed, "rival_widths": widths, **results}


def _plain(result: Result) -> dict[str, Any]:
    return asdict(result)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", default="fashion-mnist", choices=sorted(ROWS))
    parser.add_argument("--data-dir")
    parser.add_argument("--seeds", help="instead of the row's own")
    parser.add_argument("--epochs", type=int, help="instead of the row's own")
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/rivals-ROW.json")
    given = parser.parse_args()
    fields = {**COMMON, **ROWS[given.row], "data_dir": given.data_dir}
    fields |= {"epochs": given.epochs} if given.epochs else {}
    runs = []
    for seed in (given.seeds or SEEDS[given.row]).split(","):
        config = RunConfig.checked(**fields, seed=int(seed))
        runs.append(run(config))
        told = ", ".join(f"{name} {runs[-1][name]['test_metric']:.4f} in {runs[-1][name]['seconds_training']:.1f} s"
                         for name in ("dense", "apoptosis", "rival"))  # fmt: skip
        print(f"{given.row}, seed {seed}: {told}", flush=True)
    _, device = prepare(config)
    result = {"kind": "rivals", "row": given.row, "config": config.model_dump(mode="json"), "versions": versions(),
              "machine": machine(device), "runs": runs}  # fmt: skip
    target = given.json or RESULTS / f"rivals-{given.row}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    write_json(target, result)
    print(f"wrote {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
