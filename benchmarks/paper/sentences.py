"""Sentences as token ids, padded per batch to its longest: SST-2, TREC, and bundled digits read as sentences.

Holds: `Sentences`, the readers of the publishers' files. Elsewhere: networks (pretrained), training.
References: Socher et al., EMNLP 2013 (SST-2); Li, Roth, COLING 2002 (TREC).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from apoptosis.errors import DataError

LONGEST = 64  # tokens; what is longer is cut
ALIKE = 50  # batches among which sentences are sorted by length, as Trainer's group_by_length does
MULTIPLE = 8  # batches are padded to a multiple of this: few sizes, none much longer than its sentences
SPLIT_SEED = 0
Ids = list[list[int]]
Tokenise = Callable[[Sequence[str]], Ids]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sentences:
    """Examples of different lengths and their labels; a batch is what a transformer of `transformers` takes by name.

    ids: (rows, longest) int64, padded at the right. lengths: (rows,). labels: (rows,).
    """

    ids: Tensor
    lengths: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return self.labels.shape[0]

    def take(self, index: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Return inputs and labels of the rows in `index`."""
        return padded(self.ids[index], self.lengths[index]), self.labels[index]

    def between(self, start: int, stop: int) -> tuple[dict[str, Tensor], Tensor]:
        """Return inputs and labels of the rows start..stop."""
        return padded(self.ids[start:stop], self.lengths[start:stop]), self.labels[start:stop]

    def rows(self, start: int, stop: int) -> Sentences:
        """Return the rows start..stop as a part of their own, sharing memory."""
        fields = {name: getattr(self, name)[start:stop] for name in ("ids", "lengths", "labels")}
        return replace(self, **fields)

    def order(self, batch: int, generator: torch.Generator) -> Tensor:
        """Return an epoch's order of the rows: by chance, with sentences of about one length in every batch.

        Half of what a batch holds is padding otherwise. What does not fill a batch comes last.
        """
        order = torch.randperm(len(self), generator=generator)
        parts = [part[self.lengths[part].argsort(stable=True)] for part in order.split(ALIKE * batch)]
        batches = [found for part in parts for found in part.split(batch)]
        full = [found for found in batches if len(found) == batch]
        mixed = [full[i] for i in torch.randperm(len(full), generator=generator).tolist()]
        return torch.cat([*mixed, *(found for found in batches if len(found) < batch)])

    def example(self, rows: int, batch: int) -> dict[str, Tensor]:
        """Return the first rows, padded to the length that batches have on average."""
        batches = self.order(batch, torch.Generator().manual_seed(SPLIT_SEED)).split(batch)
        widest = [padded(self.ids[found], self.lengths[found])["input_ids"].shape[1] for found in batches]
        return padded(self.ids[:rows], self.lengths[:rows], sum(widest) // len(widest))


def padded(ids: Tensor, lengths: Tensor, longest: int | None = None) -> dict[str, Tensor]:
    """Return Return ids, cut to the longest row rounded up to a multiple, and the mask of what is no padding."""
    longest = int(lengths.max()) if longest is None else longest
    length = min(-(-longest // MULTIPLE) * MULTIPLE, ids.shape[1])
    mask = torch.arange(length) < lengths[:, None]
    return {"input_ids": ids[:, :length], "attention_mask": mask.long()}


def part_of(ids: Ids, labels: Sequence[int], padding: int) -> Sentences:
    """Lay rows of different lengths out as one part."""
    lengths = torch.tensor([len(row) for row in ids])
    laid = torch.full((len(ids), int(lengths.max())), padding)
    for row, own in zip(laid, ids, strict=True):
        row[: len(own)] = torch.tensor(own)
    return Sentences(ids=laid, lengths=lengths, labels=torch.tensor(labels))


def read_sst2(folder: Path, tokenise: Tokenise, padding: int) -> tuple[Sentences, Sentences, Sentences]:
    """Read train.tsv, dev.tsv and test.tsv: sentence, tab, label 0 or 1."""
    parts = []
    for name in ("train", "dev", "test"):
        lines = (folder / "sst2" / f"{name}.tsv").read_text(encoding="utf-8").splitlines()
        pairs = [line.rsplit("\t", 1) for line in lines]
        if bad := [i + 1 for i, pair in enumerate(pairs) if len(pair) != 2 or pair[1] not in "01"]:
            raise DataError(f"{folder / 'sst2' / name}.tsv, line {bad[0]}: no sentence, tab and label 0 or 1.")
        parts.append(part_of(tokenise([pair[0] for pair in pairs]), [int(pair[1]) for pair in pairs], padding))
    return parts[0], parts[1], parts[2]


def read_trec(folder: Path, tokenise: Tokenise, padding: int) -> tuple[Sentences, Sentences, Sentences]:
    """Read train.label and test.label: coarse:fine class, then the question. A tenth of the former is held out."""
    read = []
    for name in ("train", "test"):
        lines = (folder / "trec" / f"{name}.label").read_text(encoding="iso-8859-1").splitlines()
        read.append([(line.split(":")[0], line.split(" ", 1)[1]) for line in lines])
    classes = sorted({label for label, _ in read[0]})
    order = torch.randperm(len(read[0]), generator=torch.Generator().manual_seed(SPLIT_SEED)).tolist()
    read[0] = [read[0][i] for i in order]
    train, test = (
        part_of(tokenise([text for _, text in rows]), [classes.index(label) for label, _ in rows], padding)
        for rows in read
    )
    kept = len(train) - len(train) // 10
    return train.rows(0, kept), train.rows(kept, len(train)), test


def digits_as_sentences() -> tuple[Sentences, Sentences, Sentences]:
    """Read the bundled digits as rows of 16 grey values, blank ends cut off: no language, but lengths that differ."""
    from apoptosis.tools.recipes.datasets.digits import load_digits

    parts = []
    for part in load_digits():
        values = torch.nn.functional.avg_pool2d(part.inputs, 2).round().long().flatten(1) + 1
        rows = [row[: int(row.ne(1).nonzero().max()) + 1].tolist() for row in values]
        parts.append(part_of(rows, part.labels.tolist(), 0))
    train, test = parts
    kept = len(train) - len(train) // 4
    return train.rows(0, kept), train.rows(kept, len(train)), test
