"""Adapters for the tests of packing: small real ones, and every way to break one."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

TEXT = "model.language_model.layers.{}.self_attn.{}"
MODULES = {  # module -> (in, out, rank)
    TEXT.format(0, "q_proj"): (24, 24, 4),
    TEXT.format(0, "v_proj"): (24, 12, 8),
    TEXT.format(2, "q_proj"): (24, 24, 2),
    TEXT.format(10, "q_proj"): (24, 24, 16),
    "model.language_model.layers.0.mlp.gate_proj": (24, 40, 3),
    "model.vision_model.transformer.layers.0.self_attn.q_proj": (20, 20, 5),
}
BASE = "example/tiny-base"


def make_tensors(
    modules: Mapping[str, tuple[int, int, int]], dtype: torch.dtype, seed: int
) -> dict[str, torch.Tensor]:
    """PEFT's names -> A (R, D) and B (O, R), normal values, from `seed`."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (inputs, outputs, rank) in modules.items():
        prefix = f"base_model.model.{name}"
        tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator).to(dtype)
        tensors[f"{prefix}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator).to(dtype)
    return tensors


def make_config(modules: Mapping[str, tuple[int, int, int]], **changes: Any) -> dict[str, Any]:
    """adapter_config.json for `modules`, alpha 16 everywhere."""
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": BASE,
        "r": 8,
        "lora_alpha": 16,
        "rank_pattern": {"^" + name.replace(".", r"\."): rank for name, (_, _, rank) in modules.items()},
        "alpha_pattern": {},
        "target_modules": sorted({name.rpartition(".")[2] for name in modules}),
        "bias": "none",
        "use_rslora": False,
    } | changes


def make_adapter(
    folder: Path,
    modules: Mapping[str, tuple[int, int, int]] = MODULES,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    metadata: dict[str, Any] | None = None,
    **config: Any,
) -> Path:
    """Writes a mixed-rank adapter into `folder` and returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        make_tensors(modules, dtype, seed), folder / "adapter_model.safetensors", metadata={"format": "pt"}
    )
    (folder / "adapter_config.json").write_text(json.dumps(make_config(modules, **config)))
    if metadata is not None:
        (folder / "lvnas.json").write_text(json.dumps({"format": "lvnas-adapter/1", "base": BASE} | metadata))
    return folder


def split(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header and the data of a safetensors file."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def join(path: Path, header: dict[str, Any] | bytes, data: bytes, length: int | None = None) -> None:
    """Writes a safetensors file of any header, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def deltas(tensors: Mapping[str, torch.Tensor], scales: Mapping[str, float]) -> dict[str, torch.Tensor]:
    """Module -> scale * B @ A in float64, computed the plain way."""
    found = {}
    for name, scale in scales.items():
        a, b = (tensors[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
        found[name] = scale * b @ a
    return found
