"""Layer names in the quantisation settings of Llama-3.2-Vision checkpoints.

Tools that quantise a checkpoint list the layers that they left alone under the names of the Hub's layout, some
as regular expressions ("re:vision_model.*"). vLLM renames plain names of layers inside a module, neither the
expressions nor the top modules themselves, and would look for quantised weights that are not there.
"""

import re
from collections.abc import Mapping
from typing import Any

RENAMED = {
    "vision_model": "model.vision_model",
    "multi_modal_projector": "model.multi_modal_projector",
    "language_model.model": "model.language_model",
    "language_model.lm_head": "lm_head",
}
"""Modules of the Hub's layout under the names of transformers >= 5."""

LISTS = ("ignore", "modules_to_not_convert", "ignored_layers")


def rename_layer(name: str) -> str:
    """`name` as this model has it: a layer's name, an expression after "re:", or a class (unchanged)."""
    regex = name.startswith("re:")
    start, body = re.fullmatch(r"((?:re:)?\^?)(.*)", name, re.DOTALL).groups()  # type: ignore[union-attr]
    for old, new in RENAMED.items():
        pattern = old.replace(".", r"\\?\.")
        if found := re.match(pattern if regex else pattern + r"(?=\.|$)", body):
            return start + (re.escape(new) if regex else new) + body[found.end() :]
        if regex:  # after a wildcard
            body = re.sub(pattern, new.rpartition(".")[2], body)
    return start + body


def rename_layers(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's `quantization_config` with every layer name as this model has it."""
    renamed = dict(settings)
    for key in LISTS:
        if renamed.get(key):
            renamed[key] = [rename_layer(name) for name in renamed[key]]
    if groups := renamed.get("config_groups"):
        renamed["config_groups"] = {
            name: {**group, "targets": [rename_layer(target) for target in group["targets"]]}
            for name, group in groups.items()
        }
    return renamed
