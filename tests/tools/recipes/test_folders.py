"""Folders of images: layouts, kinds of files, one line for what is wrong, the copy that is kept."""

import os
import shutil

import numpy as np
import pytest
import torch

from apoptosis.errors import DataError
from apoptosis.tools.cli.app import run
from apoptosis.tools.recipes.datasets.folders import load_images, read_image

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pixels(value, shape=(12, 20), planes=3, seed=0):
    noise = np.random.default_rng(seed).integers(-9, 10, (*shape, planes))
    return (value + noise).astype(np.uint8).squeeze()


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "animals"
    for name, value in (("cat", 60), ("dog", 180)):
        (made / name / "more").mkdir(parents=True)
        for number in range(20):
            place = made / name / ("more" if number % 4 == 0 else "")
            ending = ("png", "jpg", "bmp")[number % 3]
            Image.fromarray(pixels(value, seed=number)).save(place / f"{number}.{ending}")
    (made / "dog" / "notes.txt").write_text("x")
    (made / "dog" / ".hidden.png").write_text("x")
    return made


def test_images_become_squares_and_the_split_stays(folder, cache, monkeypatch):
    data = load_images(folder, size=8)
    assert (data.shape, data.num_classes, data.about["classes"]) == ((3, 8, 8), 2, ["cat", "dog"])
    assert [len(p) for p in (data.train, data.validation, data.test)] == [28, 4, 8]
    assert data.test.labels.bincount().tolist() == [4, 4]
    assert any("1 files in" in note for note in data.notes)
    x, y = data.train.between(0, 28)
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    assert bool((x[y == 0].mean() < 0) & (x[y == 1].mean() > 0))
    assert len(list((cache / "torch-apoptosis" / "images").iterdir())) == 1
    monkeypatch.setattr("apoptosis.tools.recipes.datasets.folders.read_image", None)  # the copy is read from now on
    again = load_images(folder, size=8)
    for name in ("train", "validation", "test"):
        assert torch.equal(getattr(again, name).inputs, getattr(data, name).inputs)
    assert again.fingerprint == data.fingerprint
    monkeypatch.undo()
    os.environ["XDG_CACHE_HOME"] = str(cache)
    Image.fromarray(pixels(99)).save(folder / "cat" / "new.png")
    assert len(load_images(folder, size=8).train) == 29
    (next((cache / "torch-apoptosis" / "images").iterdir())).write_bytes(b"damaged")
    assert len(load_images(folder, size=8).test) == 8


def test_parts_in_folders_of_their_own(folder, tmp_path):
    whole = tmp_path / "parts"
    for name in ("train", "val", "test"):
        shutil.copytree(folder, whole / name)
    data = load_images(whole, size=8)
    assert [len(p) for p in (data.train, data.validation, data.test)] == [40, 40, 40]
    shutil.rmtree(whole / "val")
    data = load_images(whole, size=8)
    assert [len(p) for p in (data.train, data.validation, data.test)] == [36, 4, 40]
    (whole / "test" / "dog").rename(whole / "test" / "wolf")
    with pytest.raises(DataError, match="differ in the class 'dog'"):
        load_images(whole, size=8)


def test_kinds_of_images(tmp_path):
    colour = Image.fromarray(pixels(200, (10, 10)))
    for mode, planes in (("L", 1), ("1", 1), ("RGB", 3), ("P", 3), ("CMYK", 3), ("LA", 1), ("RGBA", 3)):
        path = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
        colour.convert(mode).save(path)
        found = read_image(path, 8)
        assert (found.shape, found.dtype) == ((planes, 8, 8), np.uint8)
        assert abs(float(found.mean()) - 200) < (60 if mode == "1" else 6)
    deep = np.full((9, 9), 32768, dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert read_image(tmp_path / "deep.png", 4).tolist() == np.full((1, 4, 4), 128).tolist()
    clear = Image.new("RGBA", (6, 6), (0, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    assert read_image(tmp_path / "clear.png", 4).min() == 255  # what is behind nothing is white
    turned = Image.fromarray(np.repeat(np.array([[0, 255]], dtype=np.uint8), 2, axis=0))
    exif = turned.getexif()
    exif[0x0112] = 3  # upside down
    turned.save(tmp_path / "turned.png", exif=exif)
    assert read_image(tmp_path / "turned.png", 2)[0].tolist() == [[255, 0], [255, 0]]


def test_what_is_wrong_is_named(folder, tmp_path):
    def fails(what, path=folder):
        with pytest.raises(DataError) as caught:
            load_images(path, size=8)
        assert what in str(caught.value)
        assert "\n" not in str(caught.value)

    fails("is no folder: --data images:DIR names a folder of classes", tmp_path / "nowhere")
    (folder / "cat" / "1.jpg").write_bytes(b"\xff\xd8nothing")
    (folder / "dog" / "2.bmp").write_bytes((folder / "dog" / "2.bmp").read_bytes()[:60])
    (folder / "dog" / "3.png").write_bytes(b"")
    fails("3 of 40 image files cannot be read: ")
    fails("3.png' (it is empty); mend or remove them")
    empty = tmp_path / "empty"
    (empty / "a").mkdir(parents=True)
    fails("holds one class, 'a'", empty)
    (empty / "b").mkdir()
    fails("holds no images: 2 folders", empty)
    Image.fromarray(pixels(9)).save(empty / "b" / "x.png")
    fails("a' holds no images: fill it, or remove the folder", empty)
    shutil.rmtree(empty / "a")
    (empty / "b" / "x.png").rename(empty / "x.png")
    (empty / "b").rmdir()
    fails("holds 1 images but no folders of classes", empty)


@pytest.mark.filterwarnings("ignore:apoptosis:RuntimeWarning")  # that so short a run has no event
def test_a_run_on_a_folder(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["--network", "cnn", "--widths", "8,16", "--size", "8", "--epochs", "2", "--batch", "7"]
    assert run(["train", "--data", "images:animals", *arguments, "--out", "one", "--align", "1"]) == 0
    out = capsys.readouterr().out
    assert "28 training, 4 validation and 8 test images (split here, the same every time), 3x8x8, of 2 classes" in out
    assert "test accuracy 100.00 %" in out
    assert run(["train", "--data", "images:nowhere", *arguments]) == 2
    assert "is no folder" in capsys.readouterr().err
