"""A run: paired runs see the same, an interrupted run goes on exactly, failures lose nothing."""

import json
import signal

import pytest
import torch

from apoptosis.decide.log import read_events
from apoptosis.distributed.ranks import Ranks
from apoptosis.errors import ArgumentError, CheckpointError, DataError, NonFiniteError
from apoptosis.tools.launch import Group, ProcessInfo
from apoptosis.tools.recipes import train as train_module
from apoptosis.tools.recipes.compare import compare
from apoptosis.tools.recipes.config import RunConfig
from apoptosis.tools.recipes.folder import RunFolder
from apoptosis.tools.recipes.interrupt import Interrupt
from apoptosis.tools.recipes.loop import Trainer
from apoptosis.tools.recipes.several import StopVote
from apoptosis.tools.recipes.train import prepare, train

SMALL = {"train_rows": 4000, "widths": (128, 128), "batch": 32, "epochs": 3, "lr": 3e-3, "probe_rows": 144}


FULL = 64 * 128 + 128 + 128 * 128 + 128 + 128 * 10 + 10


@pytest.fixture(autouse=True)
def same_calibration(monkeypatch):
    """Widths are a function of seed and calibration; the one clock that decides must tell every run the same."""
    monkeypatch.setattr("apoptosis.engine.beginning.overhead_macs", lambda capture_seconds, **_: 4.0**12)


class Quiet:
    """A watcher that does nothing; tests override what they need."""

    def data(self, data):
        pass

    def step(self, trainer, loss):
        pass

    def event(self, trainer, event):
        pass

    def epoch(self, trainer, epoch):
        pass


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Last(Quiet):
    """Keeps the trainer, to look at its network afterwards."""

    def __init__(self):
        self.trainer, self.epochs, self.events = None, [], []

    def epoch(self, trainer, epoch):
        self.trainer = trainer
        self.epochs.append(epoch)

    def event(self, trainer, event):
        self.events.append(event)


def finished(path, config, **more):
    watch = Last()
    with RunFolder(path, resume=more.get("resume", False)) as folder:
        summary = train(folder, config, watch=watch, **more)
    return watch, summary


def test_a_run_shrinks_learns_and_is_a_function_of_its_seed(tmp_path):
    config = RunConfig.checked(**SMALL, tolerance=0.1)
    one, summary = finished(tmp_path / "one", config)
    two, _ = finished(tmp_path / "two", config)
    other, _ = finished(tmp_path / "other", config.model_copy(update={"seed": 1}))
    assert same(weights(one.trainer), weights(two.trainer))
    assert [e.widths for e in one.epochs] == [e.widths for e in two.epochs]
    assert not same(weights(one.trainer), weights(other.trainer))
    assert one.events
    assert one.trainer.parameters() == one.events[-1].parameters[1] < FULL
    assert summary["result"].test_metric > 0.8
    assert one.epochs[-1].loss < one.epochs[0].loss
    records = read_events(tmp_path / "one" / "events.jsonl")
    kinds = [record["kind"] for record in records]
    assert (kinds.count("epoch"), kinds.count("run"), kinds.count("ledger"), kinds.count("summary")) == (3, 1, 1, 1)
    events = [r for r in records if r["kind"] == "event" and not r["rolled_back"]]
    assert [r["step"] for r in events] == [e.step for e in one.events]
    written = json.loads((tmp_path / "one" / "summary.json").read_text())
    assert written["result"]["widths"] == one.trainer.widths()
    assert written["ledger"]["events"] == len(one.events)
    assert (tmp_path / "one" / "config.json").exists()


def test_without_events_paired_runs_are_bitwise_the_same():
    config = RunConfig.checked(**{**SMALL, "probe_rows": 0}, dropout=0.2, exclude=("*",))
    data, device = prepare(config.model_copy(update={"epochs": 1}))
    pair = [Trainer(config.model_copy(update={"apoptosis": on}), data, device) for on in (False, True)]
    epochs = [[], []]
    for number in range(2):
        for index in (0, 1) if number else (1, 0):
            epochs[index].append(pair[index].run_epoch())
    assert pair[1].apo.groups() == ()
    assert same(weights(pair[0]), weights(pair[1]))
    assert [e.loss for e in epochs[0]] == [e.loss for e in epochs[1]]


@pytest.mark.parametrize("at", [40, 150, 250])  # inside the first window, inside an epoch, at the end of one
def test_interrupted_and_resumed_is_bitwise_the_run_without_interruption(tmp_path, monkeypatch, at):
    monkeypatch.setattr("apoptosis.tools.recipes.loop.CHECK_EVERY", 10)
    config = RunConfig.checked(**SMALL, tolerance=0.1, dropout=0.2)
    straight, summary = finished(tmp_path / "straight", config)

    class Stop(Quiet):
        def step(self, trainer, loss):
            if trainer.step == at and not trainer.interrupt.requested:
                signal.raise_signal(signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    with RunFolder(tmp_path / "cut") as folder, pytest.raises(KeyboardInterrupt):
        train(folder, config, watch=Stop())
    assert signal.getsignal(signal.SIGINT) is handler
    resumed, again = finished(tmp_path / "cut", config, resume=True)
    assert same(weights(straight.trainer), weights(resumed.trainer))
    assert again["result"].test_metric == summary["result"].test_metric
    assert [e.loss for e in again["result"].epochs] == [e.loss for e in summary["result"].epochs]
    assert again["result"].widths == summary["result"].widths
    assert again["ledger"]["accuracy_cost"] == summary["ledger"]["accuracy_cost"]


def test_an_interrupt_waits_for_a_window_until_it_is_too_long_or_comes_again(monkeypatch):
    group = Group(ProcessInfo(launcher="torchrun"), torch.device("cpu"), Ranks())
    with Interrupt(grace=1e-9) as interrupt:
        vote = StopVote(group, interrupt)
        assert not vote.now(watching=True)
        signal.raise_signal(signal.SIGINT)
        with pytest.warns(RuntimeWarning, match="ends with the window, or in 15 s; interrupt again"):
            assert not vote.now(watching=True)
        assert not vote.now(watching=True)  # and says so once
        assert vote.now(watching=False)
        signal.raise_signal(signal.SIGINT)
        assert vote.now(watching=True)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with Interrupt() as interrupt:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):  # one process alone waits for nobody
            signal.raise_signal(signal.SIGTERM)
        group = Group(ProcessInfo(launcher="mpi"), torch.device("cpu"), Ranks())
        monkeypatch.setattr("apoptosis.tools.recipes.several.WINDOW_PATIENCE", -1.0)
        with pytest.warns(RuntimeWarning, match="a second interrupt would lose what came after"):
            assert StopVote(group, interrupt).now(watching=True)


def test_nan_stops_the_run_and_keeps_the_last_checkpoint(tmp_path):
    config = RunConfig.checked(**SMALL, apoptosis=False)

    with RunFolder(tmp_path / "nan") as folder:
        with pytest.raises(NonFiniteError, match=r"loss is nan by step \d+ \(epoch 2\); lower --lr"):
            train(folder, config, watch=_PoisonAfterCheckpoint())
        data, device = prepare(config)
        trainer = Trainer(config, data, device)
        epochs = train_module.read_checkpoint(folder, trainer)
    assert len(epochs) == trainer.epoch == 1
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


class _PoisonAfterCheckpoint(Quiet):
    """Makes the weights NaN in the second epoch, when the first one's checkpoint is written."""

    def step(self, trainer, loss):
        if trainer.step > trainer.steps_per_epoch:
            with torch.no_grad():
                next(trainer.model.parameters()).fill_(float("nan"))


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    class Spoil(Quiet):
        def step(self, trainer, loss):
            if trainer.step == 2 * trainer.steps_per_epoch:
                with torch.no_grad():
                    trainer.model[-1].bias.fill_(float("inf"))

    config = RunConfig.checked(**SMALL, apoptosis=False)
    with RunFolder(tmp_path / "inf") as folder:
        with pytest.raises(NonFiniteError, match="hold NaN or infinity at step 250"):
            train(folder, config, watch=Spoil())
        trainer = Trainer(config, *prepare(config))
        assert len(train_module.read_checkpoint(folder, trainer)) == 1


def test_a_run_that_never_began_leaves_no_folder(tmp_path):
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / "train-images-idx3-ubyte.gz").write_bytes(b"no image")
    for file in ("train-labels-idx1-ubyte.gz", "t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"):
        (tmp_path / "mnist" / file).write_bytes(b"")
    config = RunConfig.checked(data="mnist", data_dir=str(tmp_path))
    with pytest.raises(DataError, match="train-images"), RunFolder(tmp_path / "run") as folder:
        train(folder, config)
    assert not (tmp_path / "run").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(DataError), RunFolder(tmp_path / "mine") as folder:
        train(folder, config)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_a_folder_is_never_written_over_and_must_hold_what_is_resumed(tmp_path):
    config = RunConfig.checked(**{**SMALL, "epochs": 1}, apoptosis=False)
    finished(tmp_path / "run", config)
    with pytest.raises(ArgumentError, match="holds a run already"):
        RunFolder(tmp_path / "run")
    with pytest.raises(DataError, match="not the folder of a run"):
        RunFolder(tmp_path / "nothing", resume=True)
    with RunFolder(tmp_path / "run", resume=True) as folder:
        data, device = prepare(config)
        other = Trainer(config.model_copy(update={"widths": (8, 8)}), data, device)
        before = weights(other)
        with pytest.raises(CheckpointError):
            train_module.read_checkpoint(folder, other)
        assert same(before, weights(other))
        reseeded = Trainer(config.model_copy(update={"seed": 5}), data, device)
        with pytest.raises(CheckpointError, match="another configuration"):
            train_module.read_checkpoint(folder, reseeded)
        folder.checkpoint.write_bytes(folder.checkpoint.read_bytes()[:-9])
        with pytest.raises(CheckpointError, match=r"last\.safetensors"):
            train_module.read_checkpoint(folder, Trainer(config, data, device))
        folder.checkpoint.unlink()
        with pytest.raises(CheckpointError, match="no checkpoint yet"):
            train_module.read_checkpoint(folder, Trainer(config, data, device))


def test_compare_trains_each_run_as_it_would_train_alone(tmp_path):
    config = RunConfig.checked(**{**SMALL, "epochs": 2}, tolerance=0.1)
    with RunFolder(tmp_path / "pair") as folder:
        summary = compare(folder, config, [0, 3])
    for seed, run in zip((0, 3), summary["runs"], strict=True):
        for name in ("dense", "apoptosis"):
            own = config.model_copy(update={"seed": seed, "apoptosis": name == "apoptosis"})
            alone, result = finished(tmp_path / f"{name}{seed}", own)
            assert run[name]["test_metric"] == result["result"].test_metric
            assert [e["loss"] for e in run[name]["epochs"]] == [e.loss for e in alone.epochs]
        assert run["parameters_ratio"] == run["dense"]["parameters"] / run["apoptosis"]["parameters"]
        assert run["speedup_run"] == run["dense"]["seconds_run"] / run["apoptosis"]["seconds_run"]
        assert 0 < run["apoptosis_share"] < 1
    order = [r["method"] for r in read_events(tmp_path / "pair" / "events.jsonl") if r["kind"] == "epoch"]
    assert order == ["dense", "apoptosis", "apoptosis", "dense", "apoptosis", "dense", "dense", "apoptosis"]
    total = summary["overall"]
    seconds = [sum(run[name]["seconds_run"] for run in summary["runs"]) for name in ("dense", "apoptosis")]
    assert total["speedup_run"] == pytest.approx(seconds[0] / seconds[1])
    assert json.loads((tmp_path / "pair" / "summary.json").read_text())["overall"] == pytest.approx(total)


@pytest.mark.parametrize(
    "values",
    [
        {"precision": "bf16"},
        {"optimizer": "sgd", "schedule": "constant", "lr": 0.05},
        {"optimizer": "adamw", "weight_decay": 0.01, "schedule": "cosine"},
        {"network": "cnn", "widths": (8, 16, 16), "train_rows": 1500, "epochs": 2},
        {"criterion": "magnitude", "tensorboard": True},
        {"validation": 0.0},
    ],
)
def test_every_choice_trains(tmp_path, values):
    config = RunConfig.checked(**{**SMALL, "epochs": 2, "tolerance": 0.1, **values})
    _, summary = finished(tmp_path / "run", config)
    assert summary["result"].test_metric > 0.5
    assert (summary["result"].validation_metric is None) == (config.validation == 0)
    assert (tmp_path / "run" / "tensorboard").exists() == config.tensorboard
