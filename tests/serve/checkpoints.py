"""Random tiny Llama-3.2-Vision checkpoints and adapters, saved as the Hub would hold them.

Every gate is far from zero: at initialisation they are zero and hide every bug behind them.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import peft
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    MllamaConfig,
    MllamaForConditionalGeneration,
    MllamaImageProcessorPil,
    MllamaProcessor,
    PreTrainedTokenizerFast,
)

BOS, EOS, PAD = "<|begin_of_text|>", "<|eot_id|>", "<|finetune_right_pad_id|>"
SPECIAL = (BOS, "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", EOS, PAD, "<|python_tag|>")
IMAGE = "<|image|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% if tools %}<|start_header_id|>system<|end_header_id|>\n\n{{ tools | tojson }}<|eot_id|>{% endif %}"
    "{% for message in messages %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|image|>{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, the special tokens, and the image token last, beyond the output head."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([*SPECIAL, IMAGE])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, model_max_length=2048
    )


def make_config(
    tokenizer: PreTrainedTokenizerFast,
    *,
    image_size: int = 28,
    vision: Mapping[str, int] | None = None,
    **text: object,
) -> MllamaConfig:
    """Six text layers, two of them cross-attention; four local and two global vision layers."""
    image = tokenizer.convert_tokens_to_ids(IMAGE)
    return MllamaConfig(
        vision_config={
            "hidden_size": 32,
            "attention_heads": 4,
            "intermediate_size": 64,
            "num_hidden_layers": 4,
            "num_global_layers": 2,
            "image_size": image_size,
            "patch_size": 14,
            "intermediate_layers_indices": [0, 1, 3],
            "vision_output_dim": 32 * 4,
            **(vision or {}),
        },
        text_config={
            "vocab_size": image,
            "hidden_size": 128,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 192,
            "num_hidden_layers": 6,
            "cross_attention_layers": [1, 4],
            "max_position_embeddings": 2048,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 128,
            },
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            **text,
        },
        image_token_index=image,
    )


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Makes every module matter: large weights; gates, norms and embeddings away from their defaults."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            noise = torch.randn(weight.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                weight.copy_(1 + 0.2 * noise)
            elif "gate" in name and weight.numel() == 1:
                weight.copy_(0.6 + 0.3 * noise.abs())
            elif weight.dim() >= 2 and "embedd" not in name and "embed_tokens" not in name:
                weight.copy_(noise / weight[0].numel() ** 0.5)
            else:
                weight.copy_(0.3 * noise)


def make_checkpoint(folder: Path, seed: int = 0, tie: bool = False, **config: object) -> Path:
    """Writes config, weights, tokenizer, processor and chat template to `folder`; `tie` copies the head."""
    tokenizer = make_tokenizer()
    mllama = make_config(tokenizer, **config)
    model = MllamaForConditionalGeneration(mllama).float()
    randomise(model, seed)
    if tie:
        model.lm_head.weight.data.copy_(
            model.model.language_model.embed_tokens.weight[: len(model.lm_head.weight)]
        )
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    size = mllama.vision_config.image_size
    images = MllamaImageProcessorPil(size={"height": size, "width": size}, max_image_tiles=4)
    MllamaProcessor(images, tokenizer, chat_template=CHAT_TEMPLATE).save_pretrained(folder)
    return folder


def to_module_names(folder: Path, drop_head: bool = False) -> None:
    """Renames the weights in `folder` to transformers 5's module names; can leave a tied head out.

    transformers saves the Hub's names (those of transformers < 4.50).
    """
    path = folder / "model.safetensors"
    new = {
        "vision_model.": "model.vision_model.",
        "multi_modal_projector.": "model.multi_modal_projector.",
        "language_model.model.": "model.language_model.",
        "language_model.lm_head.": "lm_head.",
    }
    renamed = {}
    for name, weight in load_file(path).items():
        prefix = next(prefix for prefix in new if name.startswith(prefix))
        renamed[new[prefix] + name.removeprefix(prefix)] = weight
    if drop_head:
        del renamed["lm_head.weight"]
    save_file(renamed, path, metadata={"format": "pt"})
    if drop_head:
        config = json.loads((folder / "config.json").read_text())
        config["text_config"]["tie_word_embeddings"] = True
        (folder / "config.json").write_text(json.dumps(config))


def make_adapter(
    base: Path,
    folder: Path,
    seed: int,
    ranks: Mapping[str, int],
    targets: str,
    scale: float = 1.0,
    **config: object,
) -> Path:
    """Writes a random PEFT adapter on the modules that the regex `targets` matches, with B away from zero.

    Args:
        ranks: regex of full module names to rank; "" is the default rank.
    """
    model = MllamaForConditionalGeneration.from_pretrained(base)
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    patterns = {pattern: rank for pattern, rank in ranks.items() if pattern}
    lora = peft.LoraConfig(
        r=ranks.get("", 4),
        lora_alpha=scale * ranks.get("", 4),
        target_modules=targets,
        rank_pattern=patterns,
        alpha_pattern={pattern: scale * rank for pattern, rank in patterns.items()},
        **config,
    )
    assert names
    adapted = peft.get_peft_model(model, lora)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(adapted.named_parameters()):
            if "lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * (0.5 / weight.shape[1] ** 0.5))
    adapted.save_pretrained(folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings, sort_keys=True, default=list))
    return folder
