"""Every model type of transformers, built small, with an example input found from its signature.

Holds: which class stands for a type, what its forward pass is given. Elsewhere: configurations made small
(shrunk_config.py), any measurement.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo.measure import Building, Built
from benchmarks.zoo.shrunk_config import STEPS, shrunk
from benchmarks.zoo.timm_networks import load_torchvision

MISSING = "the model types of transformers need it: pip install 'torch-apoptosis[zoo]'"
LENGTH, IMAGE, SAMPLES, FRAMES = 12, 224, 4000, 64
TRIES = 5  # sets of arguments for one model
MOST_WHOLE = 300_000_000  # parameters of a network that was not made smaller

# Which head stands for a type: the first that it has.
_HEADS = (
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM", "MODEL_FOR_MASKED_LM", "MODEL_FOR_CAUSAL_LM",
    "MODEL_FOR_IMAGE_CLASSIFICATION", "MODEL_FOR_AUDIO_CLASSIFICATION", "MODEL_FOR_CTC",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ", "MODEL_FOR_SEMANTIC_SEGMENTATION", "MODEL_FOR_VIDEO_CLASSIFICATION",
    "MODEL_FOR_DEPTH_ESTIMATION", "MODEL_FOR_OBJECT_DETECTION", "MODEL",
)  # fmt: skip


def networks() -> dict[str, str]:
    """Model type -> the module of transformers that it is of.

    Raises: ImportError: transformers is not installed.
    """
    if importlib.util.find_spec("torchvision") is not None:
        load_torchvision()  # before transformers does
    auto = importlib.import_module("transformers.models.auto.configuration_auto")
    return {name: auto.model_type_to_module_name(name) for name in sorted(auto.CONFIG_MAPPING_NAMES)}


def classes(name: str) -> list[type[nn.Module]]:
    """The classes that may stand for a type, the one with a head first."""
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    config = importlib.import_module("transformers").CONFIG_MAPPING[name]
    found: list[type[nn.Module]] = []
    for head in (*_HEADS[:-1], "MODEL"):
        names = getattr(auto, f"{head}_MAPPING_NAMES", {})
        if name in names and (head == "MODEL" or not found):
            cls = getattr(auto, f"{head}_MAPPING")[config]
            found.extend(cls if isinstance(cls, tuple) else (cls,))
    return found


def candidates(name: str, building: Building) -> Iterator[Built]:
    """Networks to try, the smallest first; what cannot be built is passed over.

    Raises: LookupError: nothing could be built; the message is the first error.
    """
    config_class = importlib.import_module("transformers").CONFIG_MAPPING[name]
    plain = config_class().to_dict()
    errors: list[str] = []
    built = False
    for steps in STEPS:
        try:
            config = config_class(**shrunk(plain, steps))
        except Exception as error:  # noqa: BLE001 - any configuration may refuse any number
            errors.append(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            continue
        for cls in classes(name)[: 1 if built else None]:
            if not steps and _parameters(cls, config) > MOST_WHOLE:
                errors.append(f"{cls.__name__}: too large as it is")
                continue
            try:
                torch.manual_seed(0)
                with building():
                    model = cls(config)
            except Exception as error:  # noqa: BLE001 - a network may raise anything
                errors.append(f"{cls.__name__}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
                continue
            built = True
            note = f"{cls.__name__}, smaller: {', '.join(steps) or 'nothing'}"
            for kwargs in islice(inputs(model), TRIES):
                yield Built(model, (), kwargs, note)
    if not built:
        raise LookupError(errors[0] if errors else "no model class")


def _parameters(cls: type[nn.Module], config: Any) -> float:
    """How many parameters a network would have; infinity where it cannot be built without data."""
    try:
        with torch.device("meta"):
            return sum(p.numel() for p in cls(config).parameters())
    except Exception:  # noqa: BLE001 - a network may raise anything
        return float("inf")


# ---------------------------------------------------------------- inputs


def inputs(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Arguments to try: what the signature demands, then more and more of what it knows."""
    parameters = inspect.signature(model.forward).parameters
    named = [p.name for p in parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    main = getattr(model, "main_input_name", "input_ids")
    demanded = [p.name for p in parameters.values()
                if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]  # fmt: skip
    config = model.config
    first = list(dict.fromkeys([*(n for n in (main,) if n in named), *demanded])) or named[:1]
    seconds = (
        (),
        ("decoder_input_ids",),
        ("pixel_values",),
        ("bbox",),
        ("input_ids", "pixel_values"),
        ("input_ids", "input_features"),
        ("input_ids", "bbox", "pixel_values"),
        ("input_ids", "input_values"),
    )
    tried: list[tuple[str, ...]] = []
    for more in seconds:
        wanted = tuple(dict.fromkeys([*first, *(n for n in more if n in named)]))
        if wanted in tried:
            continue
        tried.append(wanted)
        for variant in range(2):
            made = {n: _made(n, config, variant) for n in wanted}
            if variant and all(_made(n, config, 0).shape == t.shape for n, t in made.items() if t is not None
                               and _made(n, config, 0) is not None):  # fmt: skip
                continue
            if all(t is not None for t in made.values()):
                yield made


def _field(config: Any, *names: str, default: Any = None) -> Any:
    """The first of these fields that a configuration or one nested in it has."""
    nested = [config, *(getattr(config, n, None) for n in ("text_config", "vision_config", "audio_config", "encoder",
                                                           "backbone_config", "decoder"))]  # fmt: skip
    for one in nested:
        for name in names:
            value = one.get(name) if isinstance(one, dict) else getattr(one, name, None)
            if value is not None:
                return value
    return default


def _size(value: Any) -> tuple[int, int]:
    if isinstance(value, dict):
        return int(value.get("height", IMAGE)), int(value.get("width", IMAGE))
    if isinstance(value, list | tuple):
        return (int(value[0]), int(value[-1]))
    return int(value), int(value)


def _made(name: str, config: Any, variant: int) -> Tensor | None:
    """One argument; `variant` chooses between two usual layouts."""
    ids = torch.arange(5, 5 + LENGTH).repeat(2, 1) % max(8, int(_field(config, "vocab_size", "n_words", default=64)))
    if name in ("input_ids", "text_input_ids", "question_input_ids", "tokens"):
        return ids
    if name in ("decoder_input_ids", "qformer_input_ids"):
        return ids[:, : LENGTH // 2]
    if name in ("attention_mask", "qformer_attention_mask", "decoder_attention_mask"):
        return torch.ones(2, LENGTH, dtype=torch.int64)
    if name in ("bbox", "xpath_tags_seq", "xpath_subs_seq"):
        return torch.arange(4).repeat(2, LENGTH, 1)
    if name in ("pixel_values", "pixel_values_videos", "flattened_patches"):
        return _pixels(config, variant)
    if name in ("input_values", "audio_values", "waveform"):
        mels = _field(config, "num_mel_bins", "feature_size", default=80)
        frames = _field(config, "max_length", default=FRAMES)
        return torch.randn(2, frames, mels) if variant else torch.randn(2, SAMPLES)
    if name in ("input_features", "spectrogram", "features"):
        mels = _field(config, "num_mel_bins", "input_feat_per_channel", "feature_size", "hidden_size", default=80)
        return torch.randn(2, mels, _frames(config)) if not variant else torch.randn(2, _frames(config), mels)
    if name in ("past_values", "values"):
        length = _field(config, "context_length", "prediction_length", default=16)
        return torch.randn(2, length, _field(config, "num_input_channels", "input_size", default=1))
    if name == "hidden_states":
        return torch.randn(2, LENGTH, _field(config, "hidden_size", "d_model", default=64))
    return None


def _frames(config: Any) -> int:
    positions = _field(config, "max_source_positions", "max_length", default=None)
    return int(2 * positions) if isinstance(positions, int) and positions <= 1500 else FRAMES


def _pixels(config: Any, variant: int) -> Tensor:
    height, width = _size(_field(config, "image_size", "input_size", "pretrain_image_size", default=IMAGE))
    channels = _field(config, "num_channels", "in_channels", "in_chans", default=3)
    frames = _field(config, "num_frames", default=None)
    if (frames is not None) != bool(variant):
        return torch.randn(2, int(frames or 2), channels, height, width)
    return torch.randn(2, channels, height, width)
