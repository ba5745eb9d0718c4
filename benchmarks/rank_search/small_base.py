"""The suite's own base: an Mllama of 0.7 million parameters, several times cheaper to train than `tiny`.

It is pretrained on reading grids of digits row by row, with one image tile of 2 x 2 patches, a digit each. Kept in
the cache of bases.

    python benchmarks/rank_search/small_base.py
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from suite_tasks import PLAIN, SIDE, draw
from torch import nn
from transformers import MllamaConfig

from lvnas import bases, files
from lvnas.bases import tiny
from lvnas.bases.tiny_processor import VOCABULARY, build_processor, save_processor
from lvnas.progress import track
from lvnas.tasks import digits

POOL, STEPS, BATCH, RATE, SEED = 16384, 600, 64, 3e-3, 0
SMOOTHING = 0.1
"""Of the labels: without it the base is so sure of its answers that no task moves it for many steps."""


def folder() -> Path:
    """The base's folder; trains it where it is not there."""
    place = bases.cache_folder() / "bases" / f"rank-search-{STEPS}-{SMOOTHING}"
    if not place.exists():
        _train(place)
    return place


def config(tokenizer: Any) -> MllamaConfig:
    vision = {
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_global_layers": 1,
        "attention_heads": 4,
        "intermediate_size": 128,
        "vision_output_dim": 128,
        "intermediate_layers_indices": [1],
        "image_size": SIDE,
        "patch_size": digits.CELL,
        "max_num_tiles": 1,
        "supported_aspect_ratios": [[1, 1]],
        "initializer_range": 0.1,
    }
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": 96,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 192,
        "cross_attention_layers": [1, 3],
        "max_position_embeddings": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "initializer_range": 0.1,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return MllamaConfig(vision_config=vision, text_config=text, image_token_index=VOCABULARY)


def _train(place: Path) -> None:
    random = np.random.default_rng(SEED)
    processor = build_processor(tiny._corpus(), tile=SIDE, max_tiles=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = tiny._initialised(config(processor.tokenizer))
    pool = draw(PLAIN, "train", POOL, SEED, processor)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RATE, total_steps=STEPS, pct_start=0.07, cycle_momentum=False
    )
    losses = []
    progress = track(range(STEPS), "training the benchmark's base")
    for step in progress:
        place_in_pool = step % (POOL // BATCH)
        if place_in_pool == 0:
            order = random.permutation(POOL)
        ids = order[place_in_pool * BATCH :][:BATCH]
        inputs = {name: value[ids] for name, value in pool.items()}
        labels = inputs.pop("labels")[:, 1:]
        logits = model(**inputs).logits[:, :-1].mT
        loss = nn.functional.cross_entropy(logits, labels, label_smoothing=SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        progress.note(f"loss {np.mean(losses[-20:]):.3f}")
    with files.atomic_folder(place) as draft:
        model.eval().save_pretrained(draft)
        save_processor(processor, draft)
        files.write_json(draft / "lvnas.json", files.provenance(losses=losses))


if __name__ == "__main__":
    print(folder())
