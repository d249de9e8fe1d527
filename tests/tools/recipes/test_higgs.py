"""HIGGS: conversion in bounded memory, splits, and refusals that name the line."""

import gzip
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from apoptosis.errors import DataError
from apoptosis.tools.recipes.datasets import higgs, load_dataset


def lines_of(path: Path) -> list[str]:
    return gzip.decompress(path.read_bytes()).decode().splitlines()


def rewrite(path: Path, lines: list[str]) -> None:
    path.write_bytes(gzip.compress(("\n".join(lines) + "\n").encode()))


def test_values_split_and_standardisation(publisher):
    path = publisher.higgs(300)
    table = np.array([[float(x) for x in line.split(",")] for line in lines_of(path)])
    data = load_dataset("higgs", data_dir=publisher.root, test_rows=100, validation=0.1)
    assert (len(data.train), len(data.validation), len(data.test), data.metric) == (180, 20, 100, "auc")
    mean, deviation = table[:180, 1:].mean(0), table[:180, 1:].std(0)
    inputs, labels = data.test.between(0, 100)
    assert inputs.dtype == torch.float32
    assert np.allclose(inputs.numpy(), (table[200:, 1:] - mean) / deviation, atol=1e-5)
    assert labels.tolist() == table[200:, 0].astype(int).tolist()
    resident = data.train.resident(torch.device("cpu"))
    index = torch.tensor([3, 1, 179])
    assert torch.allclose(resident.take(index)[0], data.train.take(index)[0], atol=1e-6)
    assert resident.inputs.is_contiguous()


def test_converted_once_and_again_for_another_file(publisher):
    path = publisher.higgs(50)
    higgs.load_higgs(publisher.root, 10)
    (array,) = path.parent.glob("HIGGS-*.npy")
    assert np.load(array).shape == (50, 29)
    before = array.stat().st_mtime_ns
    higgs.load_higgs(publisher.root, 10)
    assert array.stat().st_mtime_ns == before
    rewrite(path, lines_of(path)[:40])
    train, test = higgs.load_higgs(publisher.root, 10)
    assert (len(train), len(test)) == (30, 10)


def test_the_mapped_file_cannot_be_changed_through_the_tensors(publisher):
    path = publisher.higgs(50)
    train, _ = higgs.load_higgs(publisher.root, 10)
    (array,) = path.parent.glob("HIGGS-*.npy")
    before = array.read_bytes()
    train.inputs.zero_()
    del train
    assert array.read_bytes() == before


@pytest.mark.parametrize(
    ("edit", "what"),
    [
        (lambda line: line.rsplit(",", 1)[0], r"line 42: 28 columns, not 29"),
        (lambda line: line + ",1.0", r"line 42: 30 columns, not 29"),
        (lambda line: "", r"line 42: 0 columns"),
        (lambda line: line.rsplit(",", 1)[0] + ",abc", r"line 42: 'abc' is not a number"),
        (lambda line: line.rsplit(",", 1)[0] + ",nan", r"line 42: a value that is not finite"),
        (lambda line: line.rsplit(",", 1)[0] + ",1e400", r"line 42: a value that is not finite"),
        (lambda line: "2.0," + line.split(",", 1)[1], r"line 42: a label other than 0 and 1"),
    ],
)
def test_bad_rows_are_named(publisher, edit, what):
    path = publisher.higgs(60)
    lines = lines_of(path)
    lines[41] = edit(lines[41])
    rewrite(path, lines)
    with pytest.raises(DataError, match=rf"HIGGS\.csv\.gz.*{what}"):
        higgs.load_higgs(publisher.root, 10)
    assert [p.name for p in path.parent.iterdir()] == ["HIGGS.csv.gz"]


def test_every_row_short_by_one_column(publisher):
    path = publisher.higgs(20)
    rewrite(path, [line.rsplit(",", 1)[0] for line in lines_of(path)])
    with pytest.raises(DataError, match="line 1: 28 columns, not 29"):
        higgs.load_higgs(publisher.root, 10)


@pytest.mark.parametrize("raw", [b"", b"label,f1\n", gzip.compress(b"", mtime=0)])
def test_not_a_table(publisher, raw):
    path = publisher.higgs(20)
    path.write_bytes(raw)
    with pytest.raises(DataError, match=r"HIGGS\.csv\.gz"):
        higgs.load_higgs(publisher.root, 10)


def test_cut_off_file_leaves_nothing_behind(publisher):
    path = publisher.higgs(60)
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(DataError, match="cut off"):
        higgs.load_higgs(publisher.root, 10)
    assert [p.name for p in path.parent.iterdir()] == ["HIGGS.csv.gz"]


@pytest.mark.parametrize("test_rows", [None, 60, 61])
def test_too_few_rows_for_the_test_split(publisher, test_rows):
    publisher.higgs(60)
    with pytest.raises(DataError, match=r"holds 60 rows.*--test-rows"):
        higgs.load_higgs(publisher.root, test_rows)


def test_conversion_is_bounded_in_memory(publisher):
    path = publisher.higgs(200)
    text = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(text * 250, 1))  # 50,000 rows, 37 MB of text
    tracemalloc.start()
    try:
        higgs.convert(path, path.parent / "out.npy")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert np.load(path.parent / "out.npy", mmap_mode="r").shape == (50_000, 29)
    assert peak < 32 * 2**20  # less than the text as a whole


def test_a_folder_that_may_not_be_written_stays_as_it_is(publisher, tmp_path, monkeypatch):
    path = publisher.higgs(50)
    monkeypatch.setenv("APOPTOSIS_DATA", str(publisher.root))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path.parent.chmod(0o555)
    try:
        train, _ = higgs.load_higgs(publisher.root, 10)
        assert len(train) == 40
        assert [p.name for p in path.parent.iterdir()] == ["HIGGS.csv.gz"]
        assert len(list((tmp_path / "cache" / "torch-apoptosis" / "higgs").glob("HIGGS-*.npy"))) == 1
    finally:
        path.parent.chmod(0o755)


@pytest.mark.data
def test_real_file(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # where the array goes if the folder is not writable
    folder = Path(os.environ.get("APOPTOSIS_DATA", "../shared/data"))
    if not (folder / "higgs" / "HIGGS.csv.gz").exists():
        pytest.skip(f"no higgs/HIGGS.csv.gz in '{folder}'; set APOPTOSIS_DATA")
    data = load_dataset("higgs", data_dir=folder)
    assert len(data.test) == 10_000
    inputs, _ = data.train.between(0, len(data.train))
    assert torch.allclose(inputs.mean(0), torch.zeros(28), atol=1e-3)
    assert torch.allclose(inputs.std(0), torch.ones(28), atol=1e-3)
    assert 0.4 < float(data.test.labels.double().mean()) < 0.6
