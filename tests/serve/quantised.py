"""Quantised copies of a tiny checkpoint in compressed-tensors' layout, and the oracle that they should agree with."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import load_file, save_file

GROUP = 32
WEIGHTS = {
    "int8": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
    "int4": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP},
}
SCHEMES: dict[str, dict[str, Any]] = {
    "int8": {
        "format": "int-quantized",
        "weights": WEIGHTS["int8"],
        "input_activations": {
            "num_bits": 8,
            "type": "int",
            "symmetric": True,
            "strategy": "token",
            "dynamic": True,
        },
    },
    "int4": {"format": "pack-quantized", "weights": WEIGHTS["int4"], "input_activations": None},
}
"""int8: weights per output channel, inputs per token (W8A8); int4: weights per group of 32 inputs (W4A16)."""


def quantise(base: Path, folder: Path, scheme: str, ignore: Sequence[str]) -> list[str]:
    """Writes a quantised copy of the checkpoint `base` to `folder`, and rounds `base`'s own weights to it.

    Args:
        ignore: layers left alone, under the checkpoint's own names, as `quantization_config` has them.

    Returns:
        the names of the quantised layers.
    """
    shutil.copytree(base, folder)
    weights, settings = load_file(base / "model.safetensors"), SCHEMES[scheme]
    linear = re.compile(r".*([qkvo]_proj|gate_proj|up_proj|down_proj|fc1|fc2|multi_modal_projector|lm_head)")
    names = [name.removesuffix(".weight") for name in weights if name.endswith(".weight")]
    chosen = [name for name in names if linear.fullmatch(name) and not _ignored(name, ignore)]
    stored, rounded = dict(weights), dict(weights)
    for name in chosen:
        weight = stored.pop(f"{name}.weight")
        groups = weight.unflatten(1, (-1, GROUP)) if scheme == "int4" else weight[:, None]
        most = 2 ** (settings["weights"]["num_bits"] - 1) - 1
        scale = groups.abs().amax(-1) / most
        values = (groups / scale[..., None]).round().clamp(-most, most)
        rounded[f"{name}.weight"] = (values * scale[..., None]).flatten(1)
        values = values.flatten(1).to(torch.int8)
        stored[f"{name}.weight_scale"] = scale
        if scheme == "int8":
            stored[f"{name}.weight"] = values
        else:
            stored[f"{name}.weight_packed"] = pack_to_int32(values, 4)
            stored[f"{name}.weight_shape"] = torch.tensor(weight.shape)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(rounded, base / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": settings["format"],
        "ignore": list(ignore),
        "config_groups": {"group_0": {"targets": ["Linear"], **settings}},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return chosen


def _ignored(name: str, ignore: Sequence[str]) -> bool:
    return any(re.match(x[3:], name) if x.startswith("re:") else x == name for x in ignore)


def round_inputs(model: torch.nn.Module, layers: Sequence[str]) -> None:
    """Lets the quantised layers of transformers' model see their inputs rounded to int8 per token."""

    def rounded(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
        scale = inputs[0].abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
        return (inputs[0] / scale).round() * scale

    wanted, count = {_tail(name) for name in layers}, 0
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and _tail(name.removesuffix(".base_layer")) in wanted:
            module.register_forward_pre_hook(rounded)
            count += 1
    assert count == len(layers), f"{count} of {len(layers)} quantised layers found"


def _tail(name: str) -> str:
    """A layer's name without the prefixes that differ between the Hub, transformers 5 and PEFT."""
    return re.sub(
        r".*?(vision_model|language_model|multi_modal_projector|lm_head)(\.model(?=\.))?",
        r"\1",
        name,
        count=1,
    )
