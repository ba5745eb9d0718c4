"""The embedded base `tiny`: a real Mllama of 2.5 million parameters, trained on first use to read digits.

It learns what the embedded tasks build on (reading grids of handwritten digits, counting in text) but none of
their questions, picture styles or answers.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from transformers import MllamaConfig, MllamaForConditionalGeneration, MllamaProcessor

from lvnas import files
from lvnas.bases.tiny_processor import VOCABULARY, build_processor, save_processor
from lvnas.bases.vision_features import set_vision_features
from lvnas.progress import track
from lvnas.tasks import digits
from lvnas.tasks.batches import Collator
from lvnas.tasks.task import Example

GRIDS = ((1, 1), (1, 2), (1, 3), (2, 2), (2, 2), (2, 3), (3, 3), (1, 6))


@dataclass(frozen=True, kw_only=True, slots=True)
class Pretraining:
    """How `tiny` is trained; its hash names the cached folder."""

    version: int = 2
    """Changes when the model, the processor or the mixture changes."""
    seed: int = 0
    steps: int = 600
    batch_size: int = 32
    learning_rate: float = 2e-3
    text_only: int = 4
    """Examples of each batch that have no image."""


def tiny_folder(cache: Path, recipe: Pretraining | None = None) -> Path:
    """The folder of the trained base below `cache`; trains it first where it is not there (a few minutes)."""
    recipe = recipe or Pretraining()
    digest = hashlib.sha256(json.dumps(asdict(recipe), sort_keys=True).encode()).hexdigest()[:10]
    folder = Path(cache) / "bases" / f"tiny-{digest}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not folder.exists():
                _train(recipe, folder)
    return folder


def tiny_config(processor: MllamaProcessor) -> MllamaConfig:
    """The architecture: tiles of 32 pixels in patches of 8, two tiles at most, cross-attention in 2 of 5 layers."""
    tokenizer = processor.tokenizer
    width = 128
    vision = {
        "hidden_size": width,
        "num_hidden_layers": 3,
        "num_global_layers": 1,
        "attention_heads": width // 32,
        "intermediate_size": 2 * width,
        "vision_output_dim": 3 * width,
        "intermediate_layers_indices": [1, 2],
        "image_size": digits.CELL * digits.GRID,
        "patch_size": digits.CELL,
        "max_num_tiles": 2,
        "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
        "initializer_range": 0.08,
    }
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": 192,
        "num_hidden_layers": 5,
        # vLLM's CPU attention takes head sizes from 32 up.
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "intermediate_size": 384,
        "cross_attention_layers": [1, 3],
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "initializer_range": 0.08,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return MllamaConfig(vision_config=vision, text_config=text, image_token_index=VOCABULARY)


def _train(recipe: Pretraining, folder: Path) -> None:
    random = np.random.default_rng(recipe.seed)
    processor = build_processor(_corpus(), tile=digits.CELL * digits.GRID, max_tiles=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = _initialised(tiny_config(processor))
    collate = Collator(processor)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=recipe.steps, pct_start=0.07, cycle_momentum=False
    )
    model.train()
    losses = []
    progress = track(range(recipe.steps), "training the base `tiny` (once; kept for later runs)")
    for _ in progress:
        optimizer.zero_grad()
        loss = 0.0
        # The processor takes no batch that mixes examples with and without images.
        for draw, count in (
            (_draw_picture, recipe.batch_size - recipe.text_only),
            (_draw_text, recipe.text_only),
        ):
            part = model(**collate([draw(random) for _ in range(count)])).loss * (count / recipe.batch_size)
            part.backward()
            loss += part.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss)
        progress.note(f"loss {np.mean(losses[-20:]):.3f}")
    model.eval()
    with files.atomic_folder(folder) as draft:
        model.save_pretrained(draft)
        save_processor(processor, draft)
        files.write_json(draft / "lvnas.json", files.provenance(recipe=asdict(recipe), losses=losses))


def _initialised(config: MllamaConfig) -> MllamaForConditionalGeneration:
    """Random weights with open gates and position embeddings large enough to be seen: transformers starts both at
    (nearly) zero, from where a short training never finds the image."""
    model: Any = MllamaForConditionalGeneration(config)
    text: Any = config.text_config
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("gate", "gate_attn", "gate_ffn")):
                parameter.fill_(0.7)
            elif name.endswith("gated_positional_embedding.embedding"):
                parameter.normal_(0, 0.5)
    # from_pretrained and generate look here; Llama 3.2 ends a turn with <|eot_id|>.
    model.generation_config.eos_token_id = text.eos_token_id
    model.generation_config.bos_token_id = text.bos_token_id
    model.generation_config.pad_token_id = text.pad_token_id
    set_vision_features(model)
    return model


def _draw_picture(random: np.random.Generator) -> Example:
    ask = (digits.ask_read, digits.ask_read, digits.ask_point)[random.integers(3)]
    recipe = digits.Recipe(ask, shape=GRIDS[random.integers(len(GRIDS))])
    return digits.compose(recipe, "train", random, "pretraining")


def _draw_text(random: np.random.Generator) -> Example:
    digit = random.integers(9)
    return Example((), f"What comes after {digits.WORDS[digit]}?", str(digit + 1), "pretraining")


def _corpus() -> list[str]:
    """Text for the tokenizer: the pretraining mixture's and the tasks' wording."""
    random = np.random.default_rng(0)
    recipes = [*digits.RECIPES.values(), digits.Recipe(digits.ask_read), digits.Recipe(digits.ask_point)]
    examples = [digits.compose(recipe, "train", random, "corpus") for recipe in recipes for _ in range(50)]
    headers = ["system user assistant"] * 50
    return headers + [f"{example.user}\n\n{example.assistant}" for example in examples]
