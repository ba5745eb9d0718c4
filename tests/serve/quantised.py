"""Quantised copies of a tiny checkpoint, laid out as compressed-tensors or AWQ, and the weights they stand for."""

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
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight neighbouring outputs each four bits of an int32 hold, the lowest bits first."""


def quantise(base: Path, folder: Path, scheme: str, ignore: Sequence[str]) -> list[str]:
    """Writes a quantised copy of the checkpoint `base` to `folder`, and rounds `base`'s own weights to it.

    Args:
        ignore: layers left alone, under the checkpoint's own names, as `quantization_config` has them.

    Returns:
        the names of the quantised layers.
    """
    shutil.copytree(base, folder)
    weights = load_file(base / "model.safetensors")
    linear = re.compile(r".*([qkvo]_proj|gate_proj|up_proj|down_proj|fc1|fc2|multi_modal_projector|lm_head)")
    names = [name.removesuffix(".weight") for name in weights if name.endswith(".weight")]
    chosen = [name for name in names if linear.fullmatch(name) and not _ignored(name, ignore)]
    stored, rounded = dict(weights), dict(weights)
    for name in chosen:
        weight = stored.pop(f"{name}.weight")
        tensors, rounded[f"{name}.weight"] = _awq(weight) if scheme == "awq" else _compressed(weight, scheme)
        stored |= {f"{name}.{part}": tensor for part, tensor in tensors.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(rounded, base / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = _settings(scheme, list(ignore))
    (folder / "config.json").write_text(json.dumps(config))
    return chosen


def _settings(scheme: str, ignore: list[str]) -> dict[str, Any]:
    """A checkpoint's `quantization_config`."""
    if scheme == "awq":
        layout = {"bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
        return {"quant_method": "awq", **layout, "modules_to_not_convert": ignore}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": SCHEMES[scheme]["format"],
        "ignore": ignore,
        "config_groups": {"group_0": {"targets": ["Linear"], **SCHEMES[scheme]}},
    }


def _compressed(weight: torch.Tensor, scheme: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The tensors that stand for a weight [out, in], and the weight that they stand for."""
    groups = weight.unflatten(1, (-1, GROUP)) if scheme == "int4" else weight[:, None]
    most = 2 ** (WEIGHTS[scheme]["num_bits"] - 1) - 1
    scale = groups.abs().amax(-1) / most
    values = (groups / scale[..., None]).round().clamp(-most, most)
    rounded, values = (values * scale[..., None]).flatten(1), values.flatten(1).to(torch.int8)
    if scheme == "int8":
        return {"weight": values, "weight_scale": scale}, rounded
    shape = torch.tensor(weight.shape)
    packed = pack_to_int32(values, 4)
    return {"weight_packed": packed, "weight_scale": scale, "weight_shape": shape}, rounded


def _awq(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """As `_compressed`, per group of inputs with a zero point, packed along the outputs."""
    groups = weight.unflatten(1, (-1, GROUP))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scale = ((high - low) / 15).half().float()
    zero = (-low / scale).round().clamp(0, 15)
    values = ((groups / scale[..., None]).round() + zero[..., None]).clamp(0, 15)
    rounded = ((values - zero[..., None]) * scale[..., None]).flatten(1)
    packed = {"qweight": _pack(values.flatten(1).T), "qzeros": _pack(zero.T), "scales": scale.T.half()}
    return {name: tensor.contiguous() for name, tensor in packed.items()}, rounded


def _pack(values: torch.Tensor) -> torch.Tensor:
    """Eight numbers of 0..15 per int32 along the last dimension, in AWQ's order."""
    eight = values.to(torch.int64).unflatten(-1, (-1, 8))[..., AWQ_ORDER]
    packed = (eight << (4 * torch.arange(8))).sum(-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def _ignored(name: str, ignore: Sequence[str]) -> bool:
    """An expression, a layer's name or, as AWQ has it, a part of the name."""
    return any(re.match(x[3:], name) if x.startswith("re:") else x in name for x in ignore)


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
