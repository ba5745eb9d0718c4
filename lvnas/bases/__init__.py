"""Bases: the models that adapters are made for, by short name, Hub id or folder."""

from lvnas.bases.registry import BASES, base_config, cache_folder, load, load_processor, meta_model, resolve
from lvnas.bases.vision_features import VISION_FEATURES, set_vision_features

__all__ = [
    "BASES",
    "VISION_FEATURES",
    "base_config",
    "cache_folder",
    "load",
    "load_processor",
    "meta_model",
    "resolve",
    "set_vision_features",
]
