"""idx and CIFAR files: read right, and refused when damaged, naming the file."""

import gzip
import io
import os
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from apoptosis.errors import DataError
from apoptosis.tools.recipes.datasets import DATASETS, fetch, load_dataset

TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"


def load(name, folder):
    return DATASETS[name].read(folder, None)


def test_idx_values_arrive_and_layout_is_either_folder(publisher):
    folder = publisher.idx("mnist")
    raw = gzip.decompress((folder / TRAIN_IMAGES).read_bytes())
    train, test = load("mnist", publisher.root)
    assert train.inputs.shape == (60, 1, 6, 6)
    assert len(test) == 20
    assert train.inputs.numpy().tobytes() == raw[16:]
    assert train.labels.tolist() == [i % 10 for i in range(60)]
    again, _ = load("fashion-mnist", folder)  # DIR/*.gz without a folder of its own
    assert torch.equal(again.inputs, train.inputs)


def test_parts_are_split_and_standardised_by_training_rows_alone(publisher):
    publisher.idx("mnist")
    data = load_dataset("mnist", data_dir=publisher.root, validation=0.25)
    assert (len(data.train), len(data.validation), len(data.test)) == (45, 15, 20)
    inputs, labels = data.train.take(torch.arange(45))
    assert abs(float(inputs.mean())) < 1e-4
    assert abs(float(inputs.std(correction=0)) - 1) < 1e-4
    assert labels.tolist() == [i % 10 for i in range(45)]
    held_out, _ = data.validation.between(0, 15)
    assert abs(float(held_out.mean())) > 1e-4  # its own statistics were not used
    assert data.validation.labels.tolist() == [i % 10 for i in range(45, 60)]


def damage_cut(raw: bytes) -> bytes:
    return raw[: len(raw) // 2]


def damage_magic(raw: bytes) -> bytes:
    data = bytearray(gzip.decompress(raw))
    data[2] = 9
    return gzip.compress(bytes(data))


def damage_count(raw: bytes) -> bytes:
    data = bytearray(gzip.decompress(raw))
    data[4:8] = struct.pack(">I", 61)
    return gzip.compress(bytes(data))


def damage_not_gzip(raw: bytes) -> bytes:
    return b"<html>not found</html>"


def damage_empty(raw: bytes) -> bytes:
    return b""


@pytest.mark.parametrize("file", [TRAIN_IMAGES, TRAIN_LABELS])
@pytest.mark.parametrize("damage", [damage_cut, damage_magic, damage_count, damage_not_gzip, damage_empty])
def test_damaged_idx_is_refused_by_name(publisher, file, damage):
    path = publisher.idx() / file
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=file):
        load("mnist", publisher.root)


def test_idx_counts_and_labels_are_checked(publisher):
    folder = publisher.idx()
    good = (folder / TRAIN_LABELS).read_bytes()
    (folder / TRAIN_LABELS).write_bytes(gzip.compress(struct.pack(">4BI", 0, 0, 8, 1, 59) + bytes(59)))
    with pytest.raises(DataError, match=r"60 images.*59 labels"):
        load("mnist", publisher.root)
    data = bytearray(gzip.decompress(good))
    data[-1] = 10
    (folder / TRAIN_LABELS).write_bytes(gzip.compress(bytes(data)))
    with pytest.raises(DataError, match="label 10"):
        load("mnist", publisher.root)


@pytest.mark.parametrize(("name", "rows", "classes"), [("cifar10", 40, 10), ("cifar100", 8, 100)])
def test_cifar_values_arrive(publisher, name, rows, classes):
    folder = publisher.cifar(name)
    data = load_dataset(name, data_dir=publisher.root, validation=0.0)
    assert (len(data.train), len(data.validation), len(data.test)) == (rows, 0, 8)
    assert data.num_classes == classes
    first = "train.bin" if name == "cifar100" else "data_batch_1.bin"
    raw = np.fromfile(folder / first, np.uint8).reshape(8, -1)
    header = raw.shape[1] - 3072
    assert np.array_equal(data.train.inputs[:8].numpy().reshape(8, -1), raw[:, header:])
    assert data.train.labels[:8].tolist() == raw[:, header - 1].tolist()  # cifar100: the fine label
    inputs, _ = data.train.between(0, rows)
    assert torch.allclose(inputs.mean((0, 2, 3)), torch.zeros(3), atol=1e-4)
    assert torch.allclose(inputs.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-4)


def test_damaged_cifar_is_refused_by_name(publisher):
    folder = publisher.cifar()
    path = folder / "data_batch_3.bin"
    good = path.read_bytes()
    path.write_bytes(good[:-1])
    with pytest.raises(DataError, match=r"data_batch_3\.bin.*cut off"):
        load("cifar10", publisher.root)
    path.write_bytes(b"\x0a" + good[1:])
    with pytest.raises(DataError, match=r"data_batch_3\.bin.*label 10"):
        load("cifar10", publisher.root)
    path.unlink()
    with pytest.raises(DataError, match=r"data_batch_3\.bin.*missing"):
        load("cifar10", publisher.root)


def test_cifar_archive_is_unpacked_once_and_whole_or_not_at_all(publisher):
    folder = publisher.cifar()
    archive = publisher.root / "cifar-10-binary.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
        outside = tarfile.TarInfo("../escape.txt")
        outside.size = 4
        tar.addfile(outside, io.BytesIO(b"evil"))
    kept = (folder / "data_batch_1.bin").read_bytes()
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    good = archive.read_bytes()
    archive.write_bytes(good[: len(good) // 2])
    with pytest.raises(DataError, match=r"cifar-10-binary\.tar\.gz.*cut off"):
        load("cifar10", publisher.root)
    assert sorted(path.name for path in publisher.root.iterdir()) == [archive.name]
    archive.write_bytes(good)
    train, _ = load("cifar10", publisher.root)
    assert len(train) == 40
    assert (folder / "data_batch_1.bin").read_bytes() == kept
    assert not (publisher.root.parent / "escape.txt").exists()


def test_failed_download_is_one_clear_error_and_leaves_nothing(tmp_path):
    # A port of this machine that nobody listens on: refused at once, with or without a network.
    source = fetch.Source(filename="a.gz", url="http://127.0.0.1:9/a.gz", checksum="md5:" + "0" * 32)
    with pytest.raises(DataError, match=r"'a\.gz' is not in .*127\.0\.0\.1.*--data-dir") as caught:
        fetch.obtain(source, (tmp_path / "new",))
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "new").iterdir()) == []


def test_download_with_another_checksum_is_refused(tmp_path, http_folder):
    (http_folder.path / "b.gz").write_bytes(b"something else")
    source = fetch.Source(filename="b.gz", url=http_folder.url + "b.gz", checksum="md5:" + "0" * 32)
    with pytest.raises(DataError, match="hash"):
        fetch.obtain(source, (tmp_path / "new",))
    assert list((tmp_path / "new").iterdir()) == []
    good = fetch.Source(filename="b.gz", url=http_folder.url + "b.gz", checksum="md5:6c7ba9c5a141421e1c03cb9807c97c74")
    assert fetch.obtain(good, (tmp_path / "new",)).read_bytes() == b"something else"


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "train", "test"), [("mnist", 54000, 10000), ("fashion-mnist", 54000, 10000), ("cifar10", 45000, 10000)]
)
def test_real_data(name, train, test):
    folder = Path(os.environ.get("APOPTOSIS_DATA", "../shared/data"))
    where = folder / ("cifar-10-batches-bin" if name == "cifar10" else name)
    if not where.is_dir():
        pytest.skip(f"no {name} in '{folder}'; set APOPTOSIS_DATA")
    data = load_dataset(name, data_dir=folder)
    assert (len(data.train), len(data.test)) == (train, test)
    assert torch.equal(data.test.labels.unique(), torch.arange(10))
    inputs, _ = data.train.between(0, 5000)
    assert abs(float(inputs.mean())) < 0.05
    assert abs(float(inputs.std()) - 1) < 0.05
