"""Images of the user's own, `--data images:DIR`: one folder per class, as torchvision's ImageFolder has them.

Holds: finding the files, reading and resizing them once, the copy that later runs read. Elsewhere: splits (parts).

Two layouts: DIR/CLASS/..., split here, and DIR/train/CLASS/... with DIR/test/CLASS/... or DIR/val/CLASS/... or both.
"""

from __future__ import annotations

import hashlib
import os
import struct
import warnings
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from apoptosis.errors import DataError
from apoptosis.storage.files import reason, replacing
from apoptosis.tools.recipes.datasets.fetch import cache_dir
from apoptosis.tools.recipes.datasets.parts import Dataset, Part, first_rows, split_rows, standardised
from apoptosis.tools.recipes.memory import check_memory

ByteArray = npt.NDArray[np.uint8]

ENDINGS = frozenset(".png .jpg .jpeg .bmp .gif .webp .tif .tiff .ppm .pgm .pbm".split())
TRAIN, HELD_OUT, TEST = ("train", "training"), ("val", "valid", "validation"), ("test", "testing")
# What decoders of images raise: Pillow's own errors are among them.
_UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, struct.error, zlib.error)
_VERSION = 1  # of the copies
_SHOWN = 3  # files named in a message


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """The image files below one folder of classes. labels: of each, its place among the classes."""

    folder: Path
    classes: tuple[str, ...]
    files: tuple[Path, ...]
    labels: tuple[int, ...]
    others: int  # files that are no images


def load_images(folder: Path, *, size: int = 64, validation: float = 0.1, train_rows: int | None = None) -> Dataset:
    """Read folders of classes; images become squares of `size` pixels: resized by the shorter side, the middle cut out.

    Grey images keep one plane where all are grey; else all have three. The resized images are kept in the user's cache
    folder, under a name made of where the files lie, their names, sizes and times.

    Args:
        folder: DIR.
        size: of the squares, pixels.
        validation: share of the training images that is held out where the folder brings no part for that.
        train_rows: how many of the others train; None: all.

    Raises: DataError: no such folder, no classes or one alone, a class without images, files that cannot be read; the
        first of them are named.
    """
    splits = _splits(folder)
    notes = [note for split in splits.values() for note in _notes(split)]
    classes = splits["train"].classes
    for name, split in splits.items():
        if split.classes != classes:
            odd = sorted(set(split.classes) ^ set(classes))
            raise DataError(f"'{split.folder}' and '{splits['train'].folder}' differ in the class '{odd[0]}'.")
        _check(split, name)
    pixels = {name: _pixels(split, size) for name, split in splits.items()}
    planes = max(images.shape[1] for images in pixels.values())
    arrays = {name: _planes(images, planes) for name, images in pixels.items()}
    parts = _parts(splits, arrays, validation, train_rows)
    notes.insert(0, _words(classes, parts, splits, size, planes))
    train, held_out, test = standardised(parts[0], *parts[1:], dims=(0, 2, 3))
    return Dataset(
        name=folder.name,
        shape=(planes, size, size),
        num_classes=len(classes),
        metric="accuracy",
        train=train,
        validation=held_out,
        test=test,
        notes=tuple(notes),
        fingerprint=_hash(splits.values(), size),
        about=_about(classes, size, train),
    )


def _splits(folder: Path) -> dict[str, Split]:
    """Find the training part and, where they are there, the others."""
    if not folder.is_dir():
        raise DataError(f"'{folder}' is no folder: --data images:DIR names a folder of classes, from '{Path.cwd()}'.")
    there = {path.name.lower(): path for path in _subfolders(folder)}
    found = {part: next((there[n] for n in names if n in there), None)
             for part, names in (("train", TRAIN), ("validation", HELD_OUT), ("test", TEST))}  # fmt: skip
    train = found["train"]
    if train is not None and (found["validation"] or found["test"]):
        if found["test"] is None:
            found = {"train": train, "test": found["validation"]}
        return {part: _split(path) for part, path in found.items() if path is not None}
    return {"train": _split(folder)}


def _split(folder: Path) -> Split:
    """Find the classes, in the order of their names, and their images."""
    classes = sorted(_subfolders(folder), key=lambda path: path.name)
    files: list[Path] = []
    labels: list[int] = []
    others = 0
    for label, path in enumerate(classes):
        for place, folders, names in os.walk(path):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            own = sorted(name for name in names if not name.startswith("."))
            images = [Path(place, name) for name in own if Path(name).suffix.lower() in ENDINGS]
            others += len(own) - len(images)
            files += images
            labels += [label] * len(images)
    called = tuple(path.name for path in classes)
    return Split(folder=folder, classes=called, files=tuple(files), labels=tuple(labels), others=others)


def _subfolders(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    except OSError as error:
        raise DataError(f"'{folder}' cannot be read: {reason(error)}.") from error


def _check(split: Split, name: str) -> None:
    """Refuse folders of which nothing can be learnt."""
    if not split.classes:
        loose = sum(path.suffix.lower() in ENDINGS for path in split.folder.iterdir())
        has = f"{loose} images but no folders of classes" if loose else "no folders of classes"
        raise DataError(f"'{split.folder}' holds {has}: put the images of every class into a folder of its own.")
    if len(split.classes) < 2:
        raise DataError(
            f"'{split.folder}' holds one class, '{split.classes[0]}': there is nothing to learn; folders of classes "
            "are looked for right below it."
        )
    empty = [split.classes[k] for k in range(len(split.classes)) if k not in set(split.labels)]
    if not split.files:
        raise DataError(f"'{split.folder}' holds no images: {len(split.classes)} folders, and none of them has any.")
    if empty and name != "validation":
        raise DataError(f"'{split.folder / empty[0]}' holds no images: fill it, or remove the folder.")


def _notes(split: Split) -> list[str]:
    return [f"{split.others} files in '{split.folder}' are no images, and left out"] if split.others else []


def _pixels(split: Split, size: int) -> ByteArray:
    """Return (images, planes, size, size), from the copy if there is one."""
    path = cache_dir() / "images" / f"{_hash([split], size, of_copy=True)[7:39]}.npy"
    check_memory(len(split.files) * 3 * size * size, f"'{split.folder}' at {size} pixels (see --size)")
    if path.exists():
        try:
            kept: ByteArray = np.load(path, mmap_mode="c", allow_pickle=False)
            if kept.dtype == np.uint8 and kept.ndim == 4 and len(kept) == len(split.files):
                return kept
        except (OSError, ValueError, EOFError):  # made anew
            pass
    images = _read(split, size)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial, partial.open("wb") as out:
            np.save(out, images, allow_pickle=False)
    except OSError:  # the cache saves time alone
        pass
    return images


def _read(split: Split, size: int) -> ByteArray:
    """Read all files.

    Raises: DataError: some cannot be read; says how many, and names the first.
    """
    images = np.empty((len(split.files), 3, size, size), dtype=np.uint8)
    grey, bad = True, list[str]()
    for number, path in enumerate(split.files):
        try:
            pixels = read_image(path, size)
        except _UNREADABLE as error:
            bad.append(f"'{path}' ({reason(error).replace(str(path), '...')[:80]})")
            continue
        images[number] = pixels
        grey = grey and len(pixels) == 1
    if bad:
        more = f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        raise DataError(
            f"{len(bad)} of {len(split.files)} image files cannot be read: {', '.join(bad[:_SHOWN])}{more}; mend or "
            "remove them."
        )
    return images[:, :1] if grey else images


def read_image(path: Path, size: int) -> ByteArray:
    """Return (planes, size, size) bytes of an image: one plane if it is grey, else red, green and blue.

    Raises: whatever the decoder raises.
    """
    from PIL import Image, ImageOps

    if path.stat().st_size == 0:
        raise OSError("it is empty")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the decoder, about what it mended
        with Image.open(path) as file:
            image: Any = ImageOps.exif_transpose(file)
            if image.mode.startswith("I") or image.mode == "F":
                image = _eight_bits(image)
            if image.mode == "1":
                image = image.convert("L")
            if image.mode in ("P", "PA", "LA", "RGBA"):
                image = _opaque(image)
            if image.mode not in ("L", "RGB"):
                image = image.convert("RGB")
            scale = size / min(image.size)
            across, down = (max(size, round(side * scale)) for side in image.size)
            image = image.resize((across, down), Image.Resampling.BILINEAR)
            left, top = (across - size) // 2, (down - size) // 2
            pixels = np.asarray(image.crop((left, top, left + size, top + size)), dtype=np.uint8)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _eight_bits(image: Any) -> Any:
    """Return a grey image of 16 bits, or of numbers, as one of 8."""
    from PIL import Image

    values = np.asarray(image, dtype=np.float64)
    top = 65535.0 if values.max() > 255 and image.mode != "F" else 255.0 if values.max() > 1 else 1.0
    return Image.fromarray((values / top * 255.0).clip(0, 255).round().astype(np.uint8))


def _opaque(image: Any) -> Any:
    """Return an image without transparency, on white; grey where it is grey."""
    from PIL import Image

    own = image.convert("RGBA")
    white = Image.new("RGBA", own.size, (255, 255, 255, 255))
    flat = Image.alpha_composite(white, own).convert("RGB")
    return flat.convert("L") if image.mode == "LA" else flat


def _planes(images: ByteArray, planes: int) -> Tensor:
    return torch.from_numpy(images if images.shape[1] == planes else np.repeat(images, planes, axis=1))


def _parts(
    splits: Mapping[str, Split], arrays: Mapping[str, Tensor], validation: float, train_rows: int | None
) -> list[Part]:
    """Return training, validation and test part; what the folder does not bring is split off its training images."""
    labels = {n: torch.tensor(s.labels, dtype=torch.int64, device="cpu") for n, s in splits.items()}
    train, held_out, test = split_rows(labels["train"], len(labels["train"]), validation)
    if "test" in splits:
        held = torch.cat([held_out, test]) if validation > 0 and "validation" not in splits else held_out[:0]
        held = held[: round(len(labels["train"]) * validation)]
        rest = torch.ones(len(labels["train"]), dtype=torch.bool, device="cpu")
        rest[held] = False
        order = torch.cat([train, held_out, test])
        train, held_out = order[rest[order]], held

    def part(name: str, rows: Tensor) -> Part:
        return Part(inputs=arrays[name][rows], labels=labels[name][rows])

    def whole(name: str) -> Part:
        return Part(inputs=arrays[name], labels=labels[name])

    return [
        part("train", first_rows(train, train_rows)),
        whole("validation") if "validation" in splits else part("train", held_out),
        whole("test") if "test" in splits else part("train", test),
    ]


def _words(classes: Sequence[str], parts: Sequence[Part], splits: Mapping[str, Split], size: int, planes: int) -> str:
    shown = ", ".join(classes[:8]) + (", ..." if len(classes) > 8 else "")
    split = "as the folders say" if "test" in splits else "split here, the same every time"
    return (
        f"{len(parts[0]):,} training, {len(parts[1]):,} validation and {len(parts[2]):,} test images ({split}), "
        f"{planes}x{size}x{size}, of {len(classes)} classes: {shown}"
    )


def _hash(splits: Iterable[Split], size: int, *, of_copy: bool = False) -> str:
    """Return a hash of the names and sizes of all files; of_copy: and of where they lie and when they were written."""
    found = hashlib.sha256(f"{_VERSION} {size}".encode())
    for split in splits:
        if of_copy:
            found.update(os.fsencode(split.folder.resolve()))
        for path in split.files:
            state = path.stat()
            found.update(os.fsencode(path.relative_to(split.folder).as_posix()) + f"\0{state.st_size}\0".encode())
            if of_copy:
                found.update(f"{state.st_mtime_ns}\0".encode())
    return f"sha256:{found.hexdigest()}"


def _about(classes: Sequence[str], size: int, train: Part) -> dict[str, Any]:
    assert train.shift is not None
    assert train.scale is not None
    return {"classes": list(classes), "size": size,
            "shift": train.shift.flatten().tolist(), "scale": train.scale.flatten().tolist()}  # fmt: skip
