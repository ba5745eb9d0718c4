"""Base names -> folders, configurations and loaded models."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lvnas.bases.vision_features import set_vision_features
from lvnas.errors import InputError, unknown
from lvnas.hub import HUB

SAFE: Any = {"trust_remote_code": False}
"""A checkpoint may bring Python code of its own; nothing that is loaded here is run."""
BASES = ("tiny", *HUB)
"""The short names; any other Hub id (`owner/name`) or folder works as well."""


def cache_folder() -> Path:
    """Where trained and derived files are kept: $LVNAS_CACHE, else ~/.cache/lvnas."""
    return Path(os.environ.get("LVNAS_CACHE") or Path.home() / ".cache" / "lvnas")


def resolve(base: str) -> str:
    """The folder or Hub id of `base`; trains `tiny` where it is not cached yet.

    Raises:
        InputError: neither a short name, nor a folder with a config.json, nor of the form `owner/name`.
    """
    if base == "tiny":
        from lvnas.bases.tiny import tiny_folder

        return str(tiny_folder(cache_folder()))
    if base in HUB:
        return HUB[base]
    if Path(base).is_dir():
        if not (Path(base) / "config.json").is_file():
            raise InputError(
                f"base folder {base} has no config.json; expected a checkpoint in the Hub's format"
            )
        return base
    if base.count("/") == 1 and all(part.strip(".") for part in base.split("/")):
        return base
    raise unknown("base", base, (*BASES, "a Hub id owner/name", "a checkpoint folder"))


def base_config(base: str) -> Any:
    """The transformers configuration of `base`, without a download for the short names.

    Raises:
        InputError: `base` is unknown or its configuration cannot be had.
    """
    from transformers import AutoConfig, MllamaConfig

    if base == "llama-3.2-11b-vision":
        return MllamaConfig()
    if base == "llama-3.2-90b-vision":
        text = {
            "hidden_size": 8192,
            "num_hidden_layers": 100,
            "num_attention_heads": 64,
            "intermediate_size": 28672,
            "cross_attention_layers": list(range(3, 100, 5)),
        }
        return MllamaConfig(text_config=text)
    if base == "tiny":
        from lvnas.bases.tiny import tiny_config
        from lvnas.bases.tiny_processor import build_processor

        return tiny_config(build_processor([], tile=32, max_tiles=2))
    place = resolve(base)
    try:
        config = AutoConfig.from_pretrained(place, **SAFE)
        # A vLLM engine in this process registers its own configuration class under this model type.
        return MllamaConfig.from_pretrained(place) if config.model_type == "mllama" else config
    except (OSError, ValueError) as error:
        raise InputError(
            f"base {base!r} has no configuration that transformers can load: {_said(error)}"
        ) from None


def model_class(config: Any) -> Any:
    """The transformers class for a configuration: image-text-to-text where there is one, else causal LM."""
    from transformers import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    is_vision_language = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForImageTextToText if is_vision_language else AutoModelForCausalLM


def meta_model(base: str) -> nn.Module:
    """The model of `base` on the meta device: all shapes, no weights, no download for the short names."""
    config = base_config(base)
    with torch.device("meta"):
        return model_class(config).from_config(config, **SAFE)


def load(
    base: str, *, dtype: torch.dtype | str = "auto", vision_features: str = "reference", **options: Any
) -> tuple[nn.Module, Any]:
    """Loads the model and the processor of `base`.

    Args:
        base: short name, Hub id or folder.
        dtype: of the weights; "auto" takes the checkpoint's.
        vision_features: "reference" (default) or "transformers"; see `lvnas.bases.vision_features`.
        options: for transformers' `from_pretrained`.

    Raises:
        InputError: the base is unknown or cannot be loaded.
    """
    from transformers.utils import logging

    place = resolve(base)
    config = base_config(place)
    logging.disable_progress_bar()  # its "Loading weights" comes between a command's own lines
    try:
        model = model_class(config).from_pretrained(
            place, config=config, dtype=dtype, use_safetensors=True, **SAFE, **options
        )
        processor = load_processor(place)
    except (OSError, ValueError) as error:
        raise InputError(f"base {base!r} cannot be loaded: {_said(error)}") from None
    return set_vision_features(model, vision_features), processor


def load_processor(place: str) -> Any:
    """The processor (or, for a text model, the tokenizer) of the base at a folder or Hub id."""
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(place, **SAFE)


def _said(error: Exception) -> str:
    """transformers' message, without its advice to run a checkpoint's code."""
    if "trust_remote_code" in str(error):
        return "it needs code of its own, and lvnas runs none that comes with a checkpoint"
    return str(error)
