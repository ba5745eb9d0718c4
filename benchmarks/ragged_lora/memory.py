"""Bytes of eight mixed-rank adapters at the Llama-3.2-11B-Vision shapes: the arena against padded slots.

python benchmarks/ragged_lora/memory.py [--ranks published_ranks.json] --out FILE
Adapter 0 has the ranks of the file (default: a seeded uniform draw), the others random permutations of them.
The arena is the one the engine uses, filled adapter by adapter; no weights are needed.
"""

import json
import random
from pathlib import Path

import click
import torch
from random_models import CHOICES

from lvnas.files import provenance, write_json
from lvnas.modules import canonical_name, find_targets
from lvnas_vllm.ragged.arena import Arena
from lvnas_vllm.ragged.layout import Site, plan

ELEMENT_BYTES = 2


def mllama_sites() -> list[Site]:
    """The 520 target modules of Llama-3.2-11B-Vision."""
    from transformers import MllamaConfig, MllamaForConditionalGeneration

    with torch.device("meta"):
        model = MllamaForConditionalGeneration(MllamaConfig())
    modules = find_targets(model, "all")
    return [Site(name, module.in_features, (module.out_features,)) for name, module in modules.items()]


def adapter_ranks(sites: list[Site], ranks: Path | None, adapters: int, seed: int) -> list[list[int]]:
    """Per adapter a rank per site."""
    draw = random.Random(seed)
    if ranks is None:
        first = [draw.choice(CHOICES) for _ in sites]
    else:
        content = json.loads(ranks.read_text())
        named = {canonical_name(name): rank for name, rank in content.get("ranks", content).items()}
        first = [named[site.name] for site in sites]
    return [first] + [draw.sample(first, len(first)) for _ in range(adapters - 1)]


def measure(ranks: Path | None, adapters: int, seed: int) -> dict:
    """Fills an arena with the adapters; bytes of the adapters, of the arena, and of padded slots."""
    sites = mllama_sites()
    drawn = adapter_ranks(sites, ranks, adapters, seed)
    plans = [plan(sites, [[rank] for rank in one])[1] for one in drawn]
    widths = [site.inputs + site.outputs[0] for site in sites]
    own = sum(rank * width for one in drawn for rank, width in zip(one, widths, strict=True))
    padded = adapters * max(max(one) for one in drawn) * sum(widths)
    arena = Arena.allocate(sum(plans), torch.bfloat16, "cpu", commit=False)
    for adapter, elements in enumerate(plans):
        arena.take(adapter, elements)
    assert arena.free == 0
    total = arena.data.numel()
    return {
        "modules": len(sites),
        "adapters": adapters,
        "mean parameters": own // adapters,
        "own bytes": own * ELEMENT_BYTES,
        "arena bytes": total * ELEMENT_BYTES,
        "padded bytes": padded * ELEMENT_BYTES,
        "arena / own": total / own,
        "padded / arena": padded / total,
    }


@click.command()
@click.option("--ranks", type=click.Path(path_type=Path), help="JSON: module name -> rank.")
@click.option("--adapters", default=8, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(ranks, adapters, seed, out):
    result = measure(ranks, adapters, seed)
    write_json(out, {"result": result, "seed": seed, "ranks": "file" if ranks else "uniform draw"}
               | {"provenance": provenance()})  # fmt: skip
    for name, value in result.items():
        print(f"{name:16} {value:,}" if isinstance(value, int) else f"{name:16} {value:.4f}")


if __name__ == "__main__":
    main()
