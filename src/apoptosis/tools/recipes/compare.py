"""Paired runs: the same network with and without apoptosis, epoch by epoch in one process.

Holds: the order in which they train, and the record of all seeds. Elsewhere: steps (loop), tables.
Interleaving keeps the comparison fair: whatever else the machine does meets both runs alike, and which of them goes
first alternates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from apoptosis.checkpoint import save
from apoptosis.tools.recipes.config import RunConfig
from apoptosis.tools.recipes.datasets import Dataset
from apoptosis.tools.recipes.folder import RunFolder
from apoptosis.tools.recipes.interrupt import Interrupt
from apoptosis.tools.recipes.loop import SILENT, Epoch, Trainer, Watcher
from apoptosis.tools.recipes.results import METHODS, Pair, finish, overall
from apoptosis.tools.recipes.train import prepare


def compare(
    folder: RunFolder,
    config: RunConfig,
    seeds: Sequence[int],
    *,
    watch: Watcher = SILENT,
) -> dict[str, Any]:
    """Train a pair of runs for every seed; returns the summary that is also written into the folder.

    Args:
        folder: gets the log, the summary and the final networks.
        config: the run; its `seed` and `apoptosis` are set for each run.
        seeds: one pair of runs each, trained one pair after the other.
        watch: sees the progress.

    Raises: as `train`; what is logged stays.
    """
    data, device = prepare(config)
    watch.data(data)
    folder.begin(config.model_copy(update={"seed": seeds[0]}), device, about=data.about, seeds=list(seeds))
    pairs = []
    with Interrupt() as interrupt:
        for seed in seeds:
            pair = _paired_runs(folder, config, seed, data, device, interrupt, watch)
            pairs.append(pair)
            if config.calibration is None:  # one for all seeds: later timings are reported and never decide
                config = config.model_copy(update={"calibration": pair.calibration})
    return folder.finish(
        "compare",
        config=config.model_dump(mode="json"),
        seeds=list(seeds),
        runs=[pair.as_dict() for pair in pairs],
        overall=overall(pairs),
    )


def _paired_runs(
    folder: RunFolder,
    config: RunConfig,
    seed: int,
    data: Dataset,
    device: torch.device,
    interrupt: Interrupt,
    watch: Watcher,
) -> Pair:
    events: list[Mapping[str, Any]] = []
    trainers, epochs = {}, {}
    for name in METHODS:
        own = config.model_copy(update={"seed": seed, "apoptosis": name == "apoptosis"})
        log = folder.event_logger(seed, events) if own.apoptosis else None
        trainers[name] = Trainer(own, data, device, log=log, interrupt=interrupt)
        epochs[name] = list[Epoch]()
    for number in range(config.epochs):
        for name in METHODS if (number + seed) % 2 == 0 else METHODS[::-1]:
            epoch = trainers[name].run_epoch(watch)
            epochs[name].append(epoch)
            folder.add_epoch(trainers[name], epoch)
            if interrupt.requested:
                raise KeyboardInterrupt
    results = {name: finish(trainers[name], epochs[name]) for name in METHODS}
    for name, trainer in trainers.items():
        path = folder.path / f"{name}-seed{seed}.safetensors"
        save(path, trainer.model, config=trainer.config.model_dump(mode="json"))
    apo = trainers["apoptosis"].apo
    assert apo is not None
    ledger = apo.ledger()
    apo.close()
    folder.add("ledger", seed=seed, ledger=ledger.as_dict(), text=str(ledger))
    return Pair(
        seed=seed,
        dense=results["dense"],
        apoptosis=results["apoptosis"],
        ledger=ledger.as_dict(),
        ledger_text=str(ledger),
        calibration=apo.calibration,
        events=events,
    )
