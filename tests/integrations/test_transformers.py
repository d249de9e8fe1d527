"""transformers' real Trainer: resume, best model, accumulation, bf16, folders of save_pretrained, refusals."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

transformers = pytest.importorskip("transformers", reason="the extra 'transformers' is not installed")

from transformers import (  # noqa: E402 - behind the skip
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from apoptosis import shrink_  # noqa: E402 - behind the skip
from apoptosis.errors import ApoptosisError, ArgumentError, CheckpointError  # noqa: E402 - behind the skip
from apoptosis.integrations.transformers import ApoptosisTrainerCallback, from_pretrained, save_plain  # noqa: E402 - behind the skip

transformers.utils.logging.disable_progress_bar()
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


class Words(Dataset):
    """Does word 1 come more often than word 2?"""

    def __init__(self, size: int = 640) -> None:
        self.words = torch.randint(1, 8, (size, 8), generator=torch.Generator().manual_seed(0))
        self.labels = ((self.words == 1).sum(1) > (self.words == 2).sum(1)).long()

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.words[index], "labels": self.labels[index]}


def build() -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=16,
        )
    )  # fmt: skip


def trainer(
    folder: Path, model: Any = None, *, callback: Any = None, later: bool = False, others: dict[str, Any] | None = None,
    **options: Any,
) -> Trainer:  # fmt: skip
    settings = {
        "per_device_train_batch_size": 32, "max_steps": 20, "learning_rate": 1e-3, "logging_strategy": "no",
        "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True, **options,
    }  # fmt: skip
    made = Trainer(
        model, TrainingArguments(str(folder), **settings), train_dataset=Words(), eval_dataset=Words(32),
        callbacks=[] if later else [callback], **(others or {}),
    )  # fmt: skip
    if later:
        made.add_callback(callback)
    return made


def shrinking(**options: Any) -> ApoptosisTrainerCallback:
    return ApoptosisTrainerCallback(**{"target": {"macs": 0.6}, "align": 1, "calibration": 0.0, **options})


def widths(model: torch.nn.Module) -> list[int]:
    return [layer.intermediate.dense.out_features for layer in model.bert.encoder.layer]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run that ends with its best network, of a checkpoint behind the event: the last but one."""
    folder, callback, scores = tmp_path_factory.mktemp("run"), shrinking(), iter([0.0, 0.0, 0.0, 1.0, 0.5])
    made = trainer(
        folder, callback=callback, save_strategy="steps", eval_strategy="steps", save_steps=4, eval_steps=4,
        load_best_model_at_end=True, metric_for_best_model="score",
        others={"model_init": build, "compute_metrics": lambda _: {"score": next(scores)}},
    )  # fmt: skip
    made.train()
    return made, made.model, callback, folder


def assert_same(model: torch.nn.Module, folder: Path) -> None:
    kept = from_pretrained(BertForSequenceClassification, folder)
    assert widths(kept) == widths(model)
    for name, value in kept.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_a_run_shrinks_its_events_are_in_the_log_and_the_best_network_is_loaded(trained: Any) -> None:
    made, model, callback, folder = trained
    assert max(widths(model)) < 64
    first = next(entry for entry in made.state.log_history if "event/step" in entry)
    assert 4 < first["step"] == first["event/step"] <= 16
    assert first["event/parameters_after"] < first["event/parameters_before"] == build().num_parameters()
    assert callback.ledger().parameters[1] == model.num_parameters()
    assert not model._forward_pre_hooks
    assert callback.apo.step() is None
    assert made.state.best_model_checkpoint == str(folder / "checkpoint-16")
    assert_same(model, folder / "checkpoint-16")


@pytest.mark.parametrize("step", [8, 16])
def test_a_resumed_run_comes_to_the_same_bits(trained: Any, tmp_path: Path, step: int) -> None:
    """With model_init the network is made anew after callbacks were told of the first; callbacks may be added late."""
    _, _, callback, folder = trained
    again = trainer(tmp_path, callback=(other := shrinking()), later=True, others={"model_init": build})
    again.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    assert_same(again.model, folder / "checkpoint-20")
    assert other.ledger().parameters == callback.ledger().parameters


def test_a_folder_of_save_pretrained_says_what_it_is_and_is_read_back(trained: Any, tmp_path: Path) -> None:
    made, model, _, _ = trained
    made.save_model(str(tmp_path / "trainer"))
    model.save_pretrained(tmp_path / "model", max_shard_size="4KB")
    model.eval()
    for name in ("trainer", "model"):
        folder = tmp_path / name
        for kind in (AutoModelForSequenceClassification, BertForSequenceClassification):
            loaded = from_pretrained(kind, folder)
            assert type(loaded) is BertForSequenceClassification
            assert not loaded.training
            assert torch.equal(loaded(Words().words[:4]).logits, model(Words().words[:4]).logits)
        with pytest.raises(RuntimeError, match="mismatch"):
            AutoModelForSequenceClassification.from_pretrained(folder)
        assert "random" in json.loads((folder / "config.json").read_text())["apoptosis"]["note"]
        assert "from apoptosis.integrations.transformers import from_pretrained" in (folder / "README.md").read_text()
    assert not hasattr(model.config, "apoptosis")
    half = from_pretrained(BertForSequenceClassification, tmp_path / "model", dtype=torch.bfloat16)
    assert half.dtype is torch.bfloat16
    loaded.save_pretrained(tmp_path / "again")  # what was read knows its widths, too
    assert widths(from_pretrained(BertForSequenceClassification, tmp_path / "again")) == widths(model)
    build().save_pretrained(tmp_path / "full")
    assert sorted(path.name for path in (tmp_path / "full").iterdir()) == ["config.json", "model.safetensors"]
    assert widths(from_pretrained(AutoModelForSequenceClassification, tmp_path / "full")) == [64]
    with pytest.raises(ArgumentError, match="random weights"):
        from_pretrained(BertForSequenceClassification, folder, ignore_mismatched_sizes=True)


def test_the_best_network_is_one_from_before_an_event(tmp_path: Path) -> None:
    """With accumulation, bf16 and gradient checkpointing on the way: the steps counted are those of the optimizer."""
    scores = iter([1.0, 0.0, 0.0])
    made = trainer(
        tmp_path, model := build(), callback=shrinking(), save_strategy="steps", eval_strategy="steps",
        save_steps=5, eval_steps=5, load_best_model_at_end=True, metric_for_best_model="score", max_steps=10, bf16=True,
        per_device_train_batch_size=16, gradient_accumulation_steps=2, gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        others={"compute_metrics": lambda _: {"score": next(scores)}},
    )  # fmt: skip
    made.train()
    steps = [entry["step"] for entry in made.state.log_history if "event/step" in entry]
    assert steps
    assert 5 < steps[0] <= 10
    assert widths(model) == [64]
    assert model.num_parameters() == build().num_parameters()
    assert_same(model, tmp_path / "checkpoint-5")
    assert max(widths(from_pretrained(BertForSequenceClassification, tmp_path / "checkpoint-10"))) < 64
    assert made.evaluate()["eval_loss"] > 0


def test_what_cannot_be_is_refused_by_name(trained: Any, tmp_path: Path) -> None:
    _, model, _, _ = trained
    with pytest.raises(ArgumentError, match="no option 'tolerances'; it has tolerance"):
        ApoptosisTrainerCallback(tolerances=0.1)
    several = trainer(tmp_path, build(), callback=shrinking())
    several.add_callback(shrinking())
    with pytest.raises(ArgumentError, match="one ApoptosisTrainerCallback; it has several"):
        several.train()
    plain = trainer(tmp_path, build(), callback=transformers.TrainerCallback(), max_steps=1, save_strategy="steps")
    plain.train()  # a Trainer without the callback: what it writes is what it was
    assert not [path for path in (tmp_path / "checkpoint-1").iterdir() if "apoptosis" in path.name]
    with pytest.raises(CheckpointError, match="without ApoptosisTrainerCallback"):
        trainer(tmp_path, model, callback=shrinking()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert max(widths(model)) < 64


def test_a_network_with_one_width_for_all_layers_is_read_without_this_library(trained: Any, tmp_path: Path) -> None:
    """Feed-forward layers of two widths become one; heads that lost channels are refused, as no config says them."""
    words, config = {"input_ids": Words().words[:16]}, copy.deepcopy(build().config)
    config.num_hidden_layers = 2
    torch.manual_seed(0)
    model = BertForSequenceClassification(config).eval()
    with torch.no_grad():
        for layer, kept in zip(model.bert.encoder.layer, (40, 24), strict=True):  # channels that do nothing
            layer.intermediate.dense.weight[kept:] = 0
            layer.intermediate.dense.bias[kept:] = 0
    before = model(**words).logits
    event = shrink_(model, words, [words], tolerance=0, exclude=("*attention*", "*pooler*"))
    assert sorted(after for _, after in event.groups.values()) == [24, 40]
    assert save_plain(model, tmp_path / "plain", words) == {"intermediate_size": 40}
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain")
    assert loaded.config.intermediate_size == 40
    assert widths(loaded) == [40, 40]
    assert torch.allclose(loaded(**words).logits, before, atol=1e-5)
    assert sorted(path.name for path in (tmp_path / "plain").iterdir()) == ["config.json", "model.safetensors"]
    with pytest.raises(ApoptosisError, match=r"outputs differ by .*attention"):
        save_plain(trained[1], tmp_path / "heads", words)
    assert not (tmp_path / "heads").exists()


def test_adapters_of_peft_train_resume_and_merge_on_the_base_that_others_have(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="the extra 'families' is not installed")
    config = peft.LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS")
    options = {"save_strategy": "steps", "save_steps": 10}
    made = trainer(tmp_path, peft.get_peft_model(build(), config), callback=ApoptosisTrainerCallback(), **options)
    with pytest.warns(UserWarning, match="requires no gradient"):
        made.train()
    again = trainer(tmp_path, peft.get_peft_model(build(), config), callback=ApoptosisTrainerCallback(), **options)
    with pytest.warns(UserWarning, match="requires no gradient"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    for name, value in made.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name
    loaded = peft.PeftModel.from_pretrained(build(), tmp_path / "checkpoint-20").eval()
    unmerged = loaded(Words().words[:4]).logits
    merged = loaded.merge_and_unload()
    assert torch.allclose(merged(Words().words[:4]).logits, unmerged, atol=1e-6)
    with pytest.raises(ArgumentError, match="frozen='cut' with adapters of peft"):
        trainer(tmp_path, peft.get_peft_model(build(), config), callback=shrinking(frozen="cut")).train()
