"""Time and memory of a step of the supernetwork against plain LoRA at the highest rank, in turns in one process.

    python benchmarks/rank_search/step_cost.py --out benchmarks/results/search_step_cost.json

A step is forward, backward and optimiser, on the same batches. Columns: PEFT's own LoRA; a warm-up step of
`score` that keeps gradient norms, as its first ones do, and one that does not; the two kinds of step of `darts`. Memory
is the peak of what PyTorch's allocator hands out during a step, above what is held before it.
"""

import argparse
import copy
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import MllamaConfig, MllamaForConditionalGeneration

from lvnas import bases, files, tasks
from lvnas.modules import find_targets
from lvnas.strategies import SearchConfig, make_strategy
from lvnas.strategies.warm import RAMP
from lvnas.tasks.batches import Collator

RANKS = [4, 8, 16, 32, 64]
RATE = 1e-3
Step = Callable[[int], Any]


def tiny(size: int) -> tuple[nn.Module, list[dict[str, torch.Tensor]]]:
    """The embedded base and batches of codewords."""
    model, processor = bases.load("tiny", dtype=torch.float32)
    examples = tasks.load_task("codewords", {"train": 4 * size, "search": 1, "test": 1}).splits["train"]
    collate = Collator(processor)
    return model, [collate(examples[i * size : (i + 1) * size]) for i in range(4)]


def wide(size: int) -> tuple[nn.Module, list[dict[str, torch.Tensor]]]:
    """A random Mllama with layers 5 times as wide, and random batches of 64 tokens with one image each."""
    vision = {
        "hidden_size": 640,
        "intermediate_size": 2560,
        "attention_heads": 8,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "image_size": 112,
        "patch_size": 14,
        "max_num_tiles": 1,
        "vision_output_dim": 1280,
        "intermediate_layers_indices": [0],
        "supported_aspect_ratios": [[1, 1]],
    }
    text = {
        "hidden_size": 1024,
        "intermediate_size": 3584,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "num_hidden_layers": 3,
        "cross_attention_layers": [1],
        "vocab_size": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(0)
    config = MllamaConfig(vision_config=vision, text_config=text, image_token_index=511)
    model = MllamaForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] in (
            "cross_attn_attn_gate",
            "cross_attn_mlp_gate",
            "gate_attn",
            "gate_ffn",
        ):
            nn.init.normal_(parameter, std=0.5)
    return model, [_random_batch(seed, size) for seed in range(4)]


def _random_batch(seed: int, size: int, length: int = 64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 500, (size, length), generator=generator)
    ids[:, 0] = 511
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": ids.masked_fill(ids == 511, -100),
        "pixel_values": torch.randn(size, 1, 1, 3, 112, 112, generator=generator),
        "aspect_ratio_ids": torch.ones(size, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(size, 1, 1, dtype=torch.long),
        "cross_attention_mask": torch.ones(size, length, 1, 1, dtype=torch.long),
    }


BASES = {"tiny": tiny, "wide": wide}


def plain_step(model: nn.Module, batches: list) -> Step:
    """LoRA at the highest rank as anybody would train it with PEFT."""
    highest = max(RANKS)
    config = LoraConfig(r=highest, lora_alpha=highest, target_modules=list(find_targets(model, "all")))
    peft: Any = get_peft_model(model, config)
    weights = [parameter for parameter in peft.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=RATE, weight_decay=0.0)

    def step(index: int) -> float:
        loss = peft.train()(**batches[index % len(batches)]).loss
        value = loss.item()  # the search looks at every loss as well
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value

    return step


def search_steps(model: nn.Module, batches: list) -> Iterator[tuple[str, Step]]:
    """The kinds of step of the strategies that use the supernetwork."""
    stream = [(batch, [number]) for number, batch in enumerate(batches)] * 4096
    settings: Any = {"ranks": RANKS, "learning_rate": RATE, "steps": 1 << 13}
    darts = make_strategy(copy.deepcopy(model), SearchConfig(method="darts", **settings))
    first = make_strategy(copy.deepcopy(model), SearchConfig(method="score", **settings))
    score = make_strategy(model, SearchConfig(method="score", **settings))

    def first_step(index: int) -> float:
        first.shares.clear()  # so that it looks as in its first steps
        return first.step(index, stream, stream)

    yield "score first steps", first_step
    yield "score", lambda index: score.step(RAMP + index, stream, stream)
    yield "darts weights", lambda index: darts.step(2 * index, stream, stream)
    yield "darts alpha", lambda index: darts.step(2 * index + 1, stream, stream)


def peak_bytes(step: Step, index: int) -> int:
    """The most memory that a step holds above what was held before it."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(index)
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step(index)
    events = recorded.profiler.kineto_results.events()  # type: ignore[union-attr]
    events = sorted((event for event in events if event.name() == "[memory]"), key=lambda e: e.start_ns())
    return int(np.max(np.cumsum([event.nbytes() for event in events])))


def measure(name: str, size: int, turns: int) -> dict[str, Any]:
    model, batches = BASES[name](size)
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    model.to(device)
    batches = [{key: value.to(device) for key, value in batch.items()} for batch in batches]
    columns = {"plain": plain_step(copy.deepcopy(model), batches), **dict(search_steps(model, batches))}
    fixed = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    seconds: dict[str, list[float]] = {column: [] for column in columns}
    for turn in range(turns + 2):  # two for warming up
        order = list(columns)[turn % len(columns) :] + list(columns)[: turn % len(columns)]
        for column in order:
            start = time.perf_counter()
            columns[column](turn)
            if turn >= 2:
                seconds[column].append(time.perf_counter() - start)
    peaks = {column: peak_bytes(step, turns + 2) for column, step in columns.items()}
    return {
        "base": name,
        "batch size": size,
        "tokens": int(batches[0]["input_ids"].shape[1]),
        "model bytes": fixed,
        "turns": turns,
        "columns": {
            column: {
                "milliseconds": 1e3 * float(np.median(seconds[column])),
                "time / plain": _ratio(seconds[column], seconds["plain"]),
                "peak bytes": peaks[column],
                "memory / plain": (fixed + peaks[column]) / (fixed + peaks["plain"]),
                "peak / plain": peaks[column] / peaks["plain"],
            }
            for column in columns
        },
        "seconds": seconds,
    }


def _ratio(one: list[float], other: list[float]) -> dict[str, Any]:
    """The median ratio of paired turns, with its 95% interval by the bootstrap."""
    ratios = np.array(one) / np.array(other)
    draws = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    return {"median": float(np.median(ratios)), "interval": [float(low), float(high)]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--bases", default="tiny,wide", help="of tiny, wide")
    parser.add_argument("--turns", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    before, rows = os.getloadavg(), []
    for name in arguments.bases.split(","):
        rows.append(measure(name, {"tiny": 16, "wide": 4}[name], arguments.turns))
        for column, row in rows[-1]["columns"].items():
            time_ratio = row["time / plain"]
            low, high = time_ratio["interval"]
            print(
                f"{name:5} {column:17} {row['milliseconds']:8.1f} ms  x{time_ratio['median']:.3f} "
                f"[{low:.3f}, {high:.3f}]  peak {row['peak bytes'] / 1e6:8.1f} MB x{row['peak / plain']:.3f}",
                flush=True,
            )
    facts = {"threads": arguments.threads, "load average": {"before": before, "after": os.getloadavg()}}
    files.write_json(arguments.out, {"rows": rows, **facts, "provenance": files.provenance()})


if __name__ == "__main__":
    main()
