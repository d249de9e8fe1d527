"""The configuration of a run: every choice that decides its course, checked, and written into its folder.

Holds: `RunConfig`, whose fields are the options of the command. Elsewhere: what is done with it.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from apoptosis.criteria import criteria
from apoptosis.decide.goal import is_goal
from apoptosis.errors import ArgumentError, DataError
from apoptosis.storage.files import check_regular, replacing
from apoptosis.storage.plain_json import parse
from apoptosis.tools.recipes.datasets import DATASETS
from apoptosis.tools.recipes.networks import ACTIVATIONS, NETWORKS
from apoptosis.tools.recipes.own import is_factory

IMAGES, CSV = "images:", "csv:"
Positive = Annotated[int, Field(ge=1, lt=2**31)]


class RunConfig(BaseModel):
    """One run; all fields have defaults, unknown ones are refused.

    A field is all it takes to have an option: type and default become those of the command line, the description its
    help, the rest what is refused.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    data: str = Field(
        "digits",
        description=f"Data set: {', '.join(DATASETS)}; or your own: images:DIR, csv:FILE, or package.module:factory.",
    )
    data_dir: str | None = Field(
        None,
        description="Where the publisher's files lie or are downloaded to. Default: $APOPTOSIS_DATA or the cache.",
    )
    train_rows: Positive | None = Field(
        None, description="Use only so many training rows (digits: enlarge to so many)."
    )
    test_rows: Positive | None = Field(None, description="higgs: rows at the end of the file that are the test split.")
    label: str | None = Field(None, description="csv: column to predict (--target COLUMN is understood, too).")
    drop: tuple[str, ...] = Field((), description="csv: column to leave out; may be repeated.")
    task: Literal["auto", "classification", "regression"] = Field(
        "auto", description="csv: what the column to predict is: auto, classification, regression."
    )
    size: int = Field(64, ge=4, le=4096, description="images: pixels of a side, after resizing.")
    validation: float = Field(
        0.1, ge=0, le=0.9, description="Share of the training rows held out for validation and certificates."
    )
    model: str | None = Field(None, description="Network of your own, package.module:factory, in place of --network.")
    kwargs: str = Field("{}", description="Arguments of the factory of --model, as JSON.")
    loss: str | None = Field(
        None,
        description="Loss of your own, package.module:loss, called as loss(output, labels). Default: cross-entropy of "
        "classes, mean squared error of values.",
    )
    network: str = Field("mlp", description=f"Network: {', '.join(NETWORKS)}.")
    widths: tuple[Positive, ...] | None = Field(
        None, description="Widths of hidden layers or stages, 1024,1024,1024. Default: the network's own."
    )
    activation: str = Field("relu", description=f"Activation: {', '.join(ACTIVATIONS)}.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout after every hidden linear layer.")
    epochs: Positive = Field(10, description="Passes over the training rows.")
    batch: int = Field(128, ge=2, lt=2**31, description="Rows per step.")
    optimizer: Literal["adam", "adamw", "sgd"] = Field("adam", description="Optimizer: adam, adamw, sgd.")
    lr: float = Field(1e-3, gt=0, description="Largest learning rate of the schedule.")
    weight_decay: float = Field(0.0, ge=0, description="Weight decay.")
    schedule: Literal["one-cycle", "cosine", "constant"] = Field(
        "one-cycle", description="Learning rate over time: one-cycle, cosine, constant."
    )
    seed: int = Field(0, ge=0, lt=2**31, description="Decides initialisation, order of the rows, dropout.")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1 ...")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="fp32, or bf16 (autocast).")
    threads: int | None = Field(
        None, ge=1, le=1024, description="Threads of one operator. Default: torch's own choice."
    )
    apoptosis: bool = Field(True, description="Shrink while training.")
    tolerance: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Cap per consumer site and event on the relative rms change. Default: the library's schedule.",
    )
    target: str | None = Field(
        None,
        description="Size to reach early in the run, in place of a tolerance: 2x (fewer multiply-adds), macs=0.5, "
        "parameters=0.25 or seconds=0.5.",
    )
    criterion: str = Field("interpolative", description=f"Criterion: {', '.join(criteria())}.")
    budget: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="What all removals may cost in accuracy, a share (0.002 is 0.2 points), on validation rows.",
    )
    probe_rows: int = Field(
        4096, ge=0, lt=2**31, description="Validation rows that an event is measured on (with --budget: all of them)."
    )
    align: Positive = Field(8, description="Widths are rounded up to a multiple of this.")
    exclude: tuple[str, ...] = Field((), description="Group to leave alone, by name or wildcard; may be repeated.")
    calibration: float | None = Field(
        None,
        gt=0,
        description="Fixed cost of an event in MACs, from an earlier run's summary. Default: measured once.",
    )
    tensorboard: bool = Field(False, description="Write TensorBoard scalars into the run folder.")

    @classmethod
    def checked(cls, **values: Any) -> Self:
        """Build a config, with the first thing that is wrong as one line.

        Raises: ArgumentError: names the option, what it was and what it may be.

        Example:
            >>> RunConfig.checked(epochs=0)
            Traceback (most recent call last):
            apoptosis.errors.ArgumentError: --epochs: Input should be greater than or equal to 1 (given: 0).
        """
        try:
            return cls(**values)
        except ValidationError as error:
            first = error.errors()[0]
            option = "--" + str(first["loc"][0]).replace("_", "-") + ": " if first["loc"] else ""
            message = first["msg"].removeprefix("Value error, ")
            given = f" (given: {str(first['input'])[:80]})" if first["loc"] else ""
            raise ArgumentError(f"{option}{message}{given}.") from error

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what `write` wrote.

        Raises: DataError: the file is missing, no JSON, or holds what this version does not know.
        """
        try:
            check_regular(path)
            values = parse(path.read_bytes())
            if not isinstance(values, dict):
                raise TypeError(f"it holds a {type(values).__name__}, not options by name")
            return cls.checked(**values)
        except FileNotFoundError as error:
            raise DataError(f"'{path}' is missing: '{path.parent}' is not the folder of a run.") from error
        except OSError as error:
            raise DataError(f"'{path}' cannot be read: {error.strerror or error}.") from error
        except (ValueError, TypeError) as error:
            why = " ".join(str(error).split())
            raise DataError(f"'{path}' is not the configuration of a run: {why}") from error

    def write(self, path: Path) -> None:
        """Write as JSON; the file appears whole or not at all."""
        with replacing(path) as partial:
            partial.write_text(self.model_dump_json(indent=2) + "\n")

    @model_validator(mode="before")
    @classmethod
    def _column_as_target(cls, values: Any) -> Any:
        """Take --target COLUMN as --label COLUMN, where it is no size to reach."""
        if not isinstance(values, dict) or not str(values.get("data", "")).startswith(CSV):
            return values
        column, label = values.get("target"), values.get("label")
        if isinstance(column, str) and not is_goal(column) and label in (None, column):
            return {**values, "label": column, "target": None}
        return values

    @field_validator("model", "loss")
    @classmethod
    def _factory(cls, value: str | None, info: Any) -> str | None:
        if value is not None and not is_factory(value):
            raise ValueError("not of the form package.module:factory (for example torchvision.models:resnet18)")
        return value

    @field_validator("data", "network", "activation", "criterion")
    @classmethod
    def _known(cls, value: str, info: Any) -> str:
        if info.field_name == "data" and ":" in value:
            kind, _, rest = value.partition(":")
            if f"{kind}:" in (IMAGES, CSV) and not rest.strip():
                raise ValueError(f"{kind}: is to be followed by a path")
            if f"{kind}:" not in (IMAGES, CSV) and not is_factory(value):
                raise ValueError("of your own are images:DIR, csv:FILE and package.module:factory")
            return value
        known: Collection[str] = {
            "data": DATASETS,
            "network": NETWORKS,
            "activation": ACTIVATIONS,
            "criterion": criteria(),
        }[info.field_name]
        if value not in known:
            near = difflib.get_close_matches(value, known, n=1)
            meant = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"unknown; there are {', '.join(known)}{meant}")
        return value

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.budget is not None and self.validation == 0:
            raise ValueError("--budget needs examples that do not train: set --validation above 0")
        return self


def resolve_device(name: str) -> torch.device:
    """Turn "auto", "cpu", "cuda", "cuda:1" ... into a device that is there.

    Raises: ArgumentError: an unknown name or a device this machine lacks.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device, dtype=torch.float32)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise ArgumentError(
            f"--device: '{name}' cannot be used here ({why}). Use auto, cpu, cuda or cuda:N."
        ) from error
    return device
