"""What a search costs: its time as a share of one fine-tune at uniform rank 64, both timed in turns in one process.

    python benchmarks/rank_search/search_cost.py --out benchmarks/results/rank_search/cost.json

The fine-tune is plain PEFT LoRA and AdamW on the suite's base, as many steps and examples as a plan of the suite has.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from small_base import folder
from suite import Data, Settings, search_one

from lvnas import bases, files
from lvnas.modules import find_targets

RANK = 64


def finetune_step(model: Any, data: Data, settings: Settings, steps: int) -> float:
    """Seconds of one training step at uniform rank RANK."""
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(find_targets(model, "all")))
    peft: Any = get_peft_model(model, config)
    weights = [weight for weight in peft.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=5e-3)
    stream = data.stream("train", 0)
    seconds = []
    for index in range(steps):
        start = time.perf_counter()
        peft(**stream[index][0]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    peft.unload()
    return statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--task", default="codes")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=15, help="steps timed per turn")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    settings = Settings()
    model, processor = bases.load(str(folder()), dtype=torch.float32, attn_implementation="eager")
    data = Data(arguments.task, processor, settings, seed=0)
    rows = []
    for _ in range(arguments.turns):
        finetune = settings.steps * finetune_step(model, data, settings, arguments.steps)
        start = time.perf_counter()
        found = search_one(model, data, settings, 0, "score", {}, settings.warm)
        rows.append({"search_seconds": time.perf_counter() - start, "finetune_seconds": finetune})
    shares = [row["search_seconds"] / row["finetune_seconds"] for row in rows]
    result = {
        "share_of_time": statistics.median(shares),
        "share_of_steps": found.steps / settings.steps,
        "search_steps": found.steps,
        "finetune_steps": settings.steps,
        "turns": rows,
    }
    files.write_json(arguments.out, result | files.provenance(threads=1))
    print(
        f"search / uniform-{RANK} fine-tune of {settings.steps} steps: {result['share_of_time']:.1%} of the time"
    )


if __name__ == "__main__":
    main()
