"""ApoptosisCallback in a real Lightning Trainer: steps, checkpoints, averaged copies, several optimizers, processes."""

import copy
import subprocess
import sys
import textwrap
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

pl = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")

from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging, WeightAveraging  # noqa: E402 - behind the skip
from lightning.pytorch.strategies import SingleDeviceStrategy  # noqa: E402 - behind the skip

from apoptosis.errors import ArgumentError  # noqa: E402 - behind the skip
from apoptosis.integrations.lightning import ApoptosisCallback, load_from_checkpoint  # noqa: E402 - behind the skip

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning warns of loaders and settings of these small runs
OPTIONS: dict[str, Any] = {"target": {"macs": 0.5}, "align": 1, "calibration": 0.0}


def data(rows: int = 256) -> TensorDataset:
    x = torch.randn(rows, 8, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, (x[:, 0] > 0).long())


def loader(batch: int = 32, rows: int = 256) -> DataLoader:
    return DataLoader(data(rows), batch_size=batch)


class Net(pl.LightningModule):
    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, _: int) -> None:
        self.log("loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def trainer(folder: Any, *callbacks: Any, **options: Any) -> Any:
    own: dict[str, Any] = {"max_epochs": 4, "logger": False, "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "devices": 1}
    warnings.simplefilter("ignore")
    return pl.Trainer(default_root_dir=folder, callbacks=list(callbacks), **{**own, **quiet, **options})


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(a: Any, b: Any) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: Any) -> dict[str, Any]:
    """A run of four epochs with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("whole")
    model, callback = net(), ApoptosisCallback(**OPTIONS)
    records: list[dict[str, Any]] = []
    callback._log = records.append
    kept = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, monitor="loss")
    run = trainer(
        folder, callback, kept, enable_checkpointing=True, logger=[pl.loggers.CSVLogger(folder)], log_every_n_steps=1
    )
    run.fit(model, loader(), loader())
    return {"folder": folder, "model": model, "callback": callback, "records": records, "trainer": run, "kept": kept}


def test_the_network_shrinks_and_the_run_is_told(whole: dict[str, Any]) -> None:
    model, callback = whole["model"], whole["callback"]
    assert model.net[0].out_features == model.net[2].in_features <= 24
    assert callback.apo.ledger().events
    assert callback.apo._settings.total_steps == 32
    logged = whole["trainer"].callback_metrics
    assert logged["apoptosis/parameters"] == sum(p.numel() for p in model.parameters())
    assert logged["apoptosis/macs"] == sum(
        layer.weight.numel() for layer in (model.net[0], model.net[2])
    )  # per example
    text = (next(whole["folder"].rglob("metrics.csv"))).read_text()
    assert "event/parameters_after" in text
    assert "apoptosis/macs" in text


def test_a_run_goes_on_from_a_checkpoint_to_the_same_bits(whole: dict[str, Any], tmp_path: Any) -> None:
    for epoch in (0, 2):
        model, callback = net(), ApoptosisCallback(**OPTIONS)
        run = trainer(tmp_path, callback)
        run.fit(model, loader(), loader(), ckpt_path=whole["folder"] / f"epoch={epoch}.ckpt", weights_only=False)
        assert same(weights(model), weights(whole["model"]))
        assert callback.apo.widths == whole["callback"].apo.widths
        assert callback.apo.ledger().events == whole["callback"].apo.ledger().events


def test_checkpoints_of_any_width_are_validated_and_loaded(whole: dict[str, Any], tmp_path: Any) -> None:
    paths = sorted(whole["folder"].glob("*.ckpt"))
    assert len(paths) == 4
    model = copy.deepcopy(whole["model"])
    for path in (*paths, paths[0]):  # narrower and wider again
        found = trainer(tmp_path, ApoptosisCallback()).validate(
            whole["model"], loader(), ckpt_path=path, verbose=False, weights_only=False
        )
        loaded = Net.load_from_checkpoint(path, weights_only=False)
        assert same(weights(loaded), weights(whole["model"]))
        assert found[0]["loss"] == pytest.approx(float(nn.functional.cross_entropy(loaded(data()[:][0]), data()[:][1])))
    best = whole["kept"].best_model_path
    assert load_from_checkpoint(Net, best, weights_only=False).net[0].out_features <= 48
    trainer(tmp_path, ApoptosisCallback()).validate(
        whole["model"], loader(), ckpt_path=paths[-1], verbose=False, weights_only=False
    )
    assert same(weights(whole["model"]), weights(model))


def test_steps_are_those_of_the_optimizer(whole: dict[str, Any], tmp_path: Any) -> None:
    model, callback = net(), ApoptosisCallback(**OPTIONS)
    run = trainer(tmp_path, callback, accumulate_grad_batches=4)
    run.fit(model, loader(8), loader())
    assert callback.apo._memory.step == run.global_step == 32
    assert callback.apo.widths["groups"] == whole["callback"].apo.widths["groups"]
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, whole["model"].state_dict()[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_averaged_copies_follow_and_resume(kind: str, tmp_path: Any) -> None:
    def average() -> Any:
        return WeightAveraging() if kind == "ema" else StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=2)

    model, callback = net(), ApoptosisCallback(**OPTIONS)
    kept = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer(tmp_path, average(), callback, kept, enable_checkpointing=True).fit(model, loader(), loader())
    assert model.net[0].out_features <= 24
    if kind == "ema":
        again = net()
        path = tmp_path / "epoch=2.ckpt"
        trainer(tmp_path, average(), ApoptosisCallback(**OPTIONS)).fit(
            again, loader(), loader(), ckpt_path=path, weights_only=False
        )
        assert same(weights(again), weights(model))


class Two(Net):
    """Two optimizers by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, _: int) -> None:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(self.net[0].parameters(), 1e-2), torch.optim.SGD(self.net[2].parameters(), 0.1)]


def test_several_optimizers_by_hand_and_a_module_inside(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model, callback = Two(), ApoptosisCallback(module="net", total_steps=32, **OPTIONS)
    run = trainer(tmp_path, callback)
    run.fit(model, loader(), loader())
    assert model.net[0].out_features <= 24
    assert callback.apo._memory.step == 32  # one for each batch, though each makes two optimizers step
    assert run.optimizers[0].state[model.net[0].weight]["exp_avg"].shape == model.net[0].weight.shape


def test_a_budget_is_measured_on_examples_of_the_sanity_check(tmp_path: Any) -> None:
    model, callback = net(), ApoptosisCallback(budget=0.5, probe_rows=48, **OPTIONS)
    trainer(tmp_path, callback, precision="bf16-mixed").fit(model, loader(), loader())
    assert callback.apo._acceptance.held_out is not None
    assert model.net[0].out_features < 48
    with pytest.raises(ArgumentError, match="num_sanity_val_steps"):
        trainer(tmp_path, ApoptosisCallback(budget=0.5, **OPTIONS)).fit(net(), loader())


class FSDPStrategy(SingleDeviceStrategy):
    """Of the name of one that needs several devices."""


class Silent(Net):
    forward = pl.LightningModule.forward


def test_wrong_input_is_one_line(tmp_path: Any) -> None:
    with pytest.raises(ArgumentError, match="no option 'targe'"):
        ApoptosisCallback(targe="2x")
    with pytest.raises(ArgumentError, match=r"Silent has no forward.*module= \('net'\)"):
        trainer(tmp_path, ApoptosisCallback()).fit(Silent(), loader())
    sharded = trainer(
        tmp_path, ApoptosisCallback(), strategy=FSDPStrategy(device="cpu"), accelerator="auto", devices="auto"
    )
    with pytest.raises(ArgumentError, match="FSDPStrategy spreads parameters"):
        sharded.fit(net(), loader())
    words = DataLoader([{"y": torch.zeros(2)}, {"y": torch.zeros(2)}], collate_fn=lambda batch: "words")
    with pytest.raises(ArgumentError, match="a batch is a str"):
        trainer(tmp_path, ApoptosisCallback()).fit(net(), words)


def test_a_second_fit_goes_on_with_the_run(whole: dict[str, Any], tmp_path: Any) -> None:
    model, callback = net(), ApoptosisCallback(total_steps=32, **OPTIONS)
    run = trainer(tmp_path, callback, max_epochs=2)
    run.fit(model, loader(), loader())
    assert callback.apo._memory.step == 16
    run.save_checkpoint(tmp_path / "after.ckpt")
    again, other = net(), ApoptosisCallback(total_steps=32, **OPTIONS)
    later = trainer(tmp_path, other)
    later.fit(again, loader(), loader(), ckpt_path=tmp_path / "after.ckpt", weights_only=False)
    assert 16 < other.apo._memory.step == later.global_step
    assert other.apo.ledger().events == whole["callback"].apo.ledger().events
    run.fit_loop.max_epochs = 4
    run.fit(model, loader(), loader())
    assert callback.apo._memory.step == run.global_step == 32  # Lightning makes new optimizers: not the same bits
    assert callback.apo.ledger().events == whole["callback"].apo.ledger().events
    assert model.net[0].out_features == whole["model"].net[0].out_features


def test_checkpoints_of_weights_alone_know_their_widths(whole: dict[str, Any], tmp_path: Any) -> None:
    model = net()
    run = trainer(tmp_path, ApoptosisCallback(**OPTIONS))
    run.fit(model, loader(), loader())
    run.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    assert same(weights(Net.load_from_checkpoint(tmp_path / "weights.ckpt")), weights(model))
    other = trainer(tmp_path)  # without the callback
    other.validate(model, loader(), verbose=False)
    other.save_checkpoint(tmp_path / "again.ckpt", weights_only=True)
    assert same(weights(Net.load_from_checkpoint(tmp_path / "again.ckpt")), weights(model))


class Fails(Net):
    def training_step(self, batch: Any, number: int) -> torch.Tensor:
        if self.global_step == 9:
            assert any(m._forward_hooks or m._forward_pre_hooks for m in self.modules())
            raise ValueError("no luck")
        return super().training_step(batch, number)


def test_an_error_leaves_no_hooks(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = Fails()
    run = trainer(tmp_path, ApoptosisCallback(**OPTIONS))
    with pytest.raises(ValueError, match="no luck"):
        run.fit(model, loader(), loader())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    run.save_checkpoint(tmp_path / "last.ckpt")  # the run in it is not a closed one
    again, callback = net(), ApoptosisCallback(**OPTIONS)
    trainer(tmp_path, callback).fit(again, loader(), loader(), ckpt_path=tmp_path / "last.ckpt", weights_only=False)
    assert callback.apo.ledger().events


def test_a_goal_that_is_reached_is_no_goal_of_the_narrow_network(tmp_path: Any) -> None:
    goal = {**OPTIONS, "target": {"macs": 0.1}}
    model, callback = net(), ApoptosisCallback(**goal)
    kept = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer(tmp_path, callback, kept, enable_checkpointing=True).fit(model, loader(), loader())
    assert model.net[0].out_features < 6
    again = net()
    run = trainer(tmp_path, ApoptosisCallback(**goal))
    run.fit(again, loader(), loader(), ckpt_path=tmp_path / "epoch=2.ckpt", weights_only=False)
    assert same(weights(again), weights(model))


TWO_PROCESSES = """
    import sys, torch, warnings
    warnings.simplefilter("ignore")
    sys.path.insert(0, sys.argv[1])
    from integrations.test_lightning import *
    model, callback = net(), ApoptosisCallback(**OPTIONS)
    run = trainer(sys.argv[2], callback, devices=2, strategy="ddp")
    run.fit(model, loader(16), loader())
    print(callback.apo.ledger(), flush=True)
    print("widths", callback.apo.widths["groups"], model.net[0].out_features, flush=True)
    assert model.net[0].out_features <= 24
"""


def test_two_processes_shrink_alike(tmp_path: Any) -> None:
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent(TWO_PROCESSES), encoding="utf-8")
    tests = str(__import__("pathlib").Path(__file__).resolve().parents[1])
    done = subprocess.run(
        [sys.executable, str(script), tests, str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = [line for line in done.stdout.splitlines() if line.startswith("widths")]
    assert len(told) == 2
    assert len(set(told)) == 1
