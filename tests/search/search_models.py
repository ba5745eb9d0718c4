"""Random tiny models of four architectures and batches for them; every gate is away from zero."""

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MllamaConfig,
    MllamaForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "rope_parameters": ROPE,
}
GATES = ("gate", "gate_attn", "gate_ffn", "cross_attn_attn_gate", "cross_attn_mlp_gate")


def mllama(seed: int = 0) -> MllamaForConditionalGeneration:
    torch.manual_seed(seed)
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "attention_heads": 4,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "image_size": 16,
        "patch_size": 8,
        "max_num_tiles": 1,
        "vision_output_dim": 64,
        "intermediate_layers_indices": [0],
        "supported_aspect_ratios": [[1, 1]],
    }
    text = TEXT | {
        "num_hidden_layers": 3,
        "cross_attention_layers": [1],
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = MllamaConfig(vision_config=vision, text_config=text, image_token_index=63)
    model = MllamaForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] in GATES:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def mllama_batch(seed: int = 0, size: int = 2) -> dict:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 60, (size, 6), generator=generator)
    ids[:, 0] = 63
    labels = ids.clone()
    labels[:, :3] = -100
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "pixel_values": torch.randn(size, 1, 1, 3, 16, 16, generator=generator),
        "aspect_ratio_ids": torch.ones(size, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(size, 1, 1, dtype=torch.long),
        "cross_attention_mask": torch.ones(size, 6, 1, 1, dtype=torch.long),
    }


def llama(seed: int = 0, **changes: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**TEXT | {"num_hidden_layers": 2} | changes))


def text_batch(seed: int = 0, size: int = 2) -> dict:
    ids = torch.randint(3, 60, (size, 6), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def qwen2_vl(seed: int = 0) -> Qwen2VLForConditionalGeneration:
    torch.manual_seed(seed)
    vision = {
        "depth": 2,
        "embed_dim": 32,
        "hidden_size": 32,
        "num_heads": 4,
        "mlp_ratio": 2,
        "patch_size": 4,
        "spatial_merge_size": 1,
        "temporal_patch_size": 1,
    }
    text = TEXT | {
        "num_hidden_layers": 2,
        "rope_parameters": ROPE | {"mrope_section": [1, 1, 2]},
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = Qwen2VLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=60,
        video_token_id=61,
        vision_start_token_id=62,
        vision_end_token_id=63,
    )
    return Qwen2VLForConditionalGeneration(config)


def qwen2_vl_batch(seed: int = 0) -> dict:
    batch = text_batch(seed, size=1)
    image = torch.tensor([[62, 60, 60, 60, 60, 63]])
    ids = torch.cat([image, batch["input_ids"]], dim=1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == 60).int(),
        "labels": ids,
        "pixel_values": torch.randn(4, 3 * 4 * 4, generator=torch.Generator().manual_seed(seed)),
        "image_grid_thw": torch.tensor([[1, 2, 2]]),
    }


def vit(seed: int = 0) -> ViTForImageClassification:
    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=16,
        patch_size=8,
        num_labels=5,
    )
    return ViTForImageClassification(config)


def vit_batch(seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return {
        "pixel_values": torch.randn(2, 3, 16, 16, generator=generator),
        "labels": torch.randint(0, 5, (2,), generator=generator),
    }
