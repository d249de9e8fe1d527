"""What one run is: every choice that decides its course, checked, and written into its folder.

Holds: `RunConfig`. Elsewhere: what is done with it.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from apoptosis.errors import ArgumentError, DataError
from apoptosis.storage.files import check_regular, replacing
from apoptosis.storage.plain_json import parse
from apoptosis.tools.recipes.datasets import DATASETS
from apoptosis.tools.recipes.networks import ACTIVATIONS, NETWORKS

Positive = Annotated[int, Field(ge=1, lt=2**31)]


class RunConfig(BaseModel):
    """One run; all fields have defaults, unknown ones are refused.

    Units: `lr` per step at the schedule's peak; `validation` a share of the training split; `tolerance` relative rms;
    `budget` a share of accuracy; `threads` of torch's intra-operator pool, None for torch's own choice.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    data: str = "digits"
    data_dir: str | None = None
    train_rows: Positive | None = None
    test_rows: Positive | None = None
    validation: Annotated[float, Field(ge=0, le=0.9)] = 0.1
    network: str = "mlp"
    widths: tuple[Positive, ...] | None = None
    activation: str = "relu"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    epochs: Positive = 10
    batch: Annotated[int, Field(ge=2, lt=2**31)] = 128
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    lr: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    schedule: Literal["one-cycle", "cosine", "constant"] = "one-cycle"
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    device: str = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    apoptosis: bool = True
    tolerance: Annotated[float, Field(ge=0, lt=1)] | None = None
    criterion: str = "interpolative"
    budget: Annotated[float, Field(gt=0, lt=1)] | None = None
    probe_rows: Annotated[int, Field(ge=0, lt=2**31)] = 4096
    align: Positive = 8
    exclude: tuple[str, ...] = ()
    calibration: Annotated[float, Field(gt=0)] | None = None
    tensorboard: bool = False

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

    @field_validator("data", "network", "activation")
    @classmethod
    def _known(cls, value: str, info: Any) -> str:
        known = {"data": DATASETS, "network": NETWORKS, "activation": ACTIVATIONS}[info.field_name]
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
        raise ArgumentError(f"--device: '{name}' is not there ({why}).") from error
    return device
