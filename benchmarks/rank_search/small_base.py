"""The suite's own base: an Mllama of 0.3 million parameters, several times cheaper to train than `tiny`.

It is pretrained as `tiny` is, on reading grids of digits, with one image tile. Kept in the cache of bases.

    python benchmarks/rank_search/small_base.py
"""

from pathlib import Path

import numpy as np
import torch
from transformers import MllamaConfig

from lvnas import bases, files
from lvnas.bases import tiny
from lvnas.bases.tiny_processor import VOCABULARY, build_processor, save_processor
from lvnas.progress import track
from lvnas.tasks import digits
from lvnas.tasks.batches import Collator

GRIDS = ((1, 1), (1, 2), (2, 2), (2, 2))
POOL, STEPS, BATCH, RATE, SEED = 4096, 480, 32, 3e-3, 0


def folder() -> Path:
    """The base's folder; trains it where it is not there."""
    place = bases.cache_folder() / "bases" / f"rank-search-small-{STEPS}"
    if not place.exists():
        _train(place)
    return place


def config(tokenizer) -> MllamaConfig:
    vision = {
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "attention_heads": 3,
        "intermediate_size": 96,
        "vision_output_dim": 96,
        "intermediate_layers_indices": [0],
        "image_size": digits.CELL * digits.GRID,
        "patch_size": digits.CELL,
        "max_num_tiles": 1,
        "supported_aspect_ratios": [[1, 1]],
        "initializer_range": 0.1,
    }
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
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
    processor = build_processor(tiny._corpus(), tile=digits.CELL * digits.GRID, max_tiles=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = tiny._initialised(config(processor.tokenizer))
    examples = []
    for _ in range(POOL):
        ask = (digits.ask_read, digits.ask_point)[random.integers(2)]
        recipe = digits.Recipe(ask, shape=GRIDS[random.integers(len(GRIDS))])
        examples.append(digits.compose(recipe, "train", random, "pretraining"))
    pool = Collator(processor)(examples)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RATE, total_steps=STEPS, pct_start=0.07, cycle_momentum=False
    )
    losses = []
    progress = track(range(STEPS), "training the benchmark's base")
    for step in progress:
        if step % (POOL // BATCH) == 0:
            order = random.permutation(POOL)
        ids = order[step % (POOL // BATCH) * BATCH :][:BATCH]
        loss = model(**{name: value[ids] for name, value in pool.items()}).loss
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
