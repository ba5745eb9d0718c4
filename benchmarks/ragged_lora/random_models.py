"""Random Llama configurations and mixed-rank adapters, written straight to disk: no weights are downloaded."""

import json
import random
from pathlib import Path

import torch
from safetensors.torch import save_file

CHOICES = (4, 8, 16, 32, 64)


def base(folder: Path, hidden: int, intermediate: int, layers: int) -> Path:
    """A Llama config for `--load-format dummy`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 256,
        "vocab_size": 2048,
        "max_position_embeddings": 4096,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def shapes(folder: Path) -> dict[str, tuple[int, int]]:
    """Module name -> (input features, output features) of every linear layer."""
    config = json.loads((folder / "config.json").read_text())
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    narrow = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    per_layer = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden, narrow),
        "self_attn.v_proj": (hidden, narrow),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (hidden, wide),
        "mlp.up_proj": (hidden, wide),
        "mlp.down_proj": (wide, hidden),
    }
    return {
        f"model.layers.{layer}.{name}": shape
        for layer in range(config["num_hidden_layers"])
        for name, shape in per_layer.items()
    }


def adapter(base_folder: Path, folder: Path, ranks: list[int], seed: int) -> Path:
    """A PEFT adapter whose i-th module has rank ranks[i]."""
    folder.mkdir(parents=True, exist_ok=True)
    generator, tensors, pattern = torch.Generator().manual_seed(seed), {}, {}
    for (name, (inputs, outputs)), rank in zip(shapes(base_folder).items(), ranks, strict=True):
        key = f"base_model.model.{name}"
        noise = torch.randn(rank, inputs + outputs, generator=generator) * 0.01
        tensors[f"{key}.lora_A.weight"] = noise[:, :inputs].to(torch.bfloat16).contiguous()
        tensors[f"{key}.lora_B.weight"] = noise[:, inputs:].T.to(torch.bfloat16).contiguous()
        pattern[f"^{name.replace('.', chr(92) + '.')}$"] = rank
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "bias": "none", "task_type": "CAUSAL_LM"}
    config |= {"target_modules": list(shapes(base_folder)), "rank_pattern": pattern, "alpha_pattern": pattern}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def draw_ranks(count: int, seed: int, source: Path | None = None) -> list[int]:
    """`count` ranks: uniform from {4, 8, 16, 32, 64}, or drawn from the ranks in the JSON file `source`."""
    choices = list(CHOICES)
    if source is not None:
        content = json.loads(source.read_text())
        found = content.get("ranks", content)
        choices = list(found.values()) if isinstance(found, dict) else list(found)
    draw = random.Random(seed)
    return [draw.choice(choices) for _ in range(count)]
