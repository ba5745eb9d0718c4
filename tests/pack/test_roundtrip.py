"""A packed adapter, loaded by PEFT and by vLLM's own loader, gives PEFT's update of the original."""

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MllamaForConditionalGeneration

from lvnas.adapters import read_adapter
from lvnas.modules import rank_pattern_key
from lvnas.pack import PackOptions, pack

Deltas = dict[str, torch.Tensor]
NAMES = {
    "model.vision_model.transformer.layers.0.self_attn.q_proj": 4,
    "model.vision_model.global_transformer.layers.0.mlp.fc1": 8,
    "model.language_model.layers.0.self_attn.q_proj": 2,
    "model.language_model.layers.0.mlp.gate_proj": 16,
    "model.language_model.layers.1.cross_attn.k_proj": 5,
    "model.language_model.layers.1.mlp.down_proj": 3,
}
ALPHAS = dict(zip(NAMES, (4, 2, 7, 16, 1, 5), strict=True))
# Largest error of one element against the largest element of the update. `ragged` copies the values. `pad`
# rounds scale * B once to the element type: 2**-24 for float32, 2**-11 for float16, 2**-8 for bfloat16.
TOLERANCE = {"float32": 1e-6, "float16": 2**-10, "bfloat16": 2**-7}


@functools.cache
def load_base(base: Path) -> MllamaForConditionalGeneration:
    return MllamaForConditionalGeneration.from_pretrained(base)


def lora_config(**changes: Any) -> peft.LoraConfig:
    patterns = {rank_pattern_key(name): rank for name, rank in NAMES.items()}
    options = {"r": 8, "lora_alpha": 16, "target_modules": list(NAMES), "rank_pattern": patterns} | changes
    return peft.LoraConfig(**options)


def adalora_config(**changes: Any) -> peft.AdaLoraConfig:
    return peft.AdaLoraConfig(init_r=8, lora_alpha=12, target_modules=list(NAMES), total_step=10, **changes)


CASES: dict[str, Callable[[], peft.PeftConfig]] = {
    "mixed ranks, constant scale": lambda: lora_config(
        alpha_pattern={rank_pattern_key(name): 2 * rank for name, rank in NAMES.items()}
    ),
    "mixed ranks, one alpha": lora_config,
    "mixed ranks, mixed alphas": lambda: lora_config(
        alpha_pattern={rank_pattern_key(name): alpha for name, alpha in ALPHAS.items()}
    ),
    # PEFT sorts the keys when it saves them; the first that matches then wins.
    "patterns as people write them": lambda: lora_config(
        rank_pattern={r"language_model\.layers\.\d+\.mlp\..*": 12, "q_proj": 6, "v?.*": 3},
        alpha_pattern={"k_proj": 5},
    ),
    "rsLoRA": lambda: lora_config(use_rslora=True),
    "EVA": lambda: lora_config(init_lora_weights="eva"),
    "orthogonal": lambda: lora_config(
        init_lora_weights="orthogonal", rank_pattern={rank_pattern_key(name): 4 for name in NAMES}
    ),
    "AdaLoRA": adalora_config,
}


def save_trained(base: Path, folder: Path, config: peft.PeftConfig, dtype: torch.dtype) -> Path:
    """An adapter as PEFT saves it, with random weights of `dtype` in every factor."""
    wrapped = peft.get_peft_model(
        copy.deepcopy(load_base(base)), config, low_cpu_mem_usage=config.init_lora_weights == "eva"
    )
    torch.manual_seed(1)
    weights = peft.get_peft_model_state_dict(wrapped)
    trained = {name: (torch.randn(value.shape) * 0.5).to(dtype) for name, value in sorted(weights.items())}
    if isinstance(config, peft.AdaLoraConfig):
        trained = cut_ranks(wrapped, trained)
    folder.mkdir()
    wrapped.peft_config["default"].base_model_name_or_path = str(base)
    wrapped.peft_config["default"].inference_mode = True
    wrapped.peft_config["default"].save_pretrained(folder)
    save_file(
        {name: value.contiguous() for name, value in trained.items()}, folder / "adapter_model.safetensors"
    )
    return folder


def cut_ranks(model: peft.PeftModel, weights: Deltas) -> Deltas:
    """What AdaLoRA leaves after training: boolean masks, rows cut, one module at rank 0."""
    masks = {}
    for index, name in enumerate(NAMES):
        mask = [(index + row) % 3 != 0 for row in range(8)] if index else [False] * 8
        masks[f"{name}.lora_E"] = mask
        for part in ("lora_A", "lora_E"):
            weights[f"base_model.model.{name}.{part}"] = weights[f"base_model.model.{name}.{part}"][mask]
        weights[f"base_model.model.{name}.lora_B"] = weights[f"base_model.model.{name}.lora_B"][:, mask]
    model.peft_config["default"].rank_pattern = masks
    return weights


def peft_deltas(base: Path, adapter: Path) -> Deltas:
    """Module -> update, as PEFT computes it after loading `adapter`."""
    model = peft.PeftModel.from_pretrained(copy.deepcopy(load_base(base)), adapter)
    layers = {n: m for n, m in model.base_model.model.named_modules() if hasattr(m, "get_delta_weight")}
    deltas = {name: layer.get_delta_weight("default").detach().double() for name, layer in layers.items()}
    return {name: delta for name, delta in deltas.items() if delta.any()}


def worst_error(found: Deltas, wanted: Deltas) -> float:
    assert found.keys() == wanted.keys()
    return max(float((found[name] - wanted[name]).abs().max() / wanted[name].abs().max()) for name in wanted)


def packed(adapter: Path, out: Path, **options: Any) -> Path:
    entry = pack([read_adapter(adapter)], out, PackOptions(**options))["adapters"][0]
    return out / entry["path"]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES)
def test_peft_gives_the_same_update(case: str, dtype: str, base_folder: Path, tmp_path: Path) -> None:
    adapter = save_trained(base_folder, tmp_path / "adapter", CASES[case](), getattr(torch, dtype))
    wanted = peft_deltas(base_folder, adapter)
    assert len(wanted) == (5 if case == "AdaLoRA" else 6)
    for layout in ("pad", "group", "ragged"):
        found = peft_deltas(base_folder, packed(adapter, tmp_path / layout, layout=layout))
        limit = 1e-6 if layout == "ragged" and case != "AdaLoRA" else TOLERANCE[dtype]
        assert worst_error(found, wanted) <= limit, layout


def test_a_scale_that_is_a_power_of_two_is_exact(base_folder: Path, tmp_path: Path) -> None:
    config = CASES["mixed ranks, constant scale"]()
    adapter = save_trained(base_folder, tmp_path / "adapter", config, torch.bfloat16)
    wanted = peft_deltas(base_folder, adapter)
    assert worst_error(peft_deltas(base_folder, packed(adapter, tmp_path / "pad")), wanted) == 0


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_changing_the_element_type(dtype: str, base_folder: Path, tmp_path: Path) -> None:
    adapter = save_trained(base_folder, tmp_path / "adapter", lora_config(), torch.float32)
    wanted = peft_deltas(base_folder, adapter)
    for layout in ("pad", "ragged"):
        found = peft_deltas(base_folder, packed(adapter, tmp_path / layout, layout=layout, dtype=dtype))
        assert worst_error(found, wanted) <= 2 * TOLERANCE[dtype]  # both factors are rounded


def vllm_deltas(adapter: Path, old: bool = False) -> Deltas:
    """Module -> update from vLLM's loader; `old`: as vLLM before 0.32, which reads neither pattern."""
    lora_model = pytest.importorskip("vllm.lora.lora_model")
    from vllm.lora.peft_helper import PEFTHelper

    helper = PEFTHelper.from_local_dir(str(adapter), max_position_embeddings=None)
    if old:
        helper = PEFTHelper.from_dict(
            json.loads((adapter / "adapter_config.json").read_text())
            | {"rank_pattern": {}, "alpha_pattern": {}}
        )
    suffixes = {name.rpartition(".")[2] for name in NAMES}
    loaded = lora_model.LoRAModel.from_local_checkpoint(
        str(adapter), suffixes, helper, lora_model_id=1, device="cpu"
    )
    updates = {}
    for name, lora in loaded.loras.items():
        assert lora.rank == lora.lora_a.shape[0] == lora.lora_b.shape[1]
        updates[name] = lora.scaling * lora.lora_b.double() @ lora.lora_a.double()
    return updates


@pytest.mark.parametrize("case", ["mixed ranks, one alpha", "mixed ranks, mixed alphas", "rsLoRA", "AdaLoRA"])
def test_vllm_old_and_new_gives_the_same_update(case: str, base_folder: Path, tmp_path: Path) -> None:
    adapter = save_trained(base_folder, tmp_path / "adapter", CASES[case](), torch.float32)
    wanted = peft_deltas(base_folder, adapter)
    pad = packed(adapter, tmp_path / "pad")
    assert worst_error(vllm_deltas(pad), wanted) <= 1e-6
    assert worst_error(vllm_deltas(pad, old=True), wanted) <= 1e-6
    ragged = packed(adapter, tmp_path / "ragged", layout="ragged")
    assert worst_error(vllm_deltas(ragged), wanted) <= 1e-6


def test_names_of_older_transformers_are_mapped(base_folder: Path, tmp_path: Path) -> None:
    adapter = save_trained(base_folder, tmp_path / "adapter", lora_config(), torch.float32)
    wanted = peft_deltas(base_folder, adapter)
    weights = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())

    def older(name: str) -> str:
        return name.replace("model.vision_model", "vision_model").replace(
            "model.language_model", "language_model.model"
        )

    save_file({older(name): value for name, value in weights.items()}, adapter / "adapter_model.safetensors")
    config["target_modules"] = [older(name) for name in config["target_modules"]]
    config["rank_pattern"] = {rank_pattern_key(older(name)): rank for name, rank in NAMES.items()}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert worst_error(peft_deltas(base_folder, packed(adapter, tmp_path / "pad")), wanted) <= 1e-6


def test_shards_are_put_together(base_folder: Path, tmp_path: Path) -> None:
    adapter = save_trained(base_folder, tmp_path / "adapter", lora_config(), torch.float32)
    whole = packed(adapter, tmp_path / "whole")
    weights = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    names = sorted(weights)
    places = {}
    for number, part in enumerate((names[:5], names[5:]), 1):
        file = f"adapter_model-0000{number}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, adapter / file)
        places |= dict.fromkeys(part, file)
    (adapter / "adapter_model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": places})
    )
    sharded = packed(adapter, tmp_path / "sharded")
    assert (sharded / "adapter_model.safetensors").read_bytes() == (
        whole / "adapter_model.safetensors"
    ).read_bytes()
