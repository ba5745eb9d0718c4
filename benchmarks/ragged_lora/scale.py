"""Decode throughput of one batch as its requests share 1, 4, 16, 64 or 256 active adapters; 1,000 registered.

python benchmarks/ragged_lora/scale.py --out FILE
The batch is the same size throughout, so the curve shows what more active adapters cost.
"""

import os
import statistics
import tempfile
from pathlib import Path

import click
import random_models
from engine import Engine

from lvnas.files import provenance, write_json

ACTIVE = (0, 1, 4, 16, 64, 256)


@click.command()
@click.option("--registered", default=1000, show_default=True)
@click.option("--batch", default=256, show_default=True)
@click.option("--tokens", default=8, show_default=True)
@click.option("--hidden", default=512, show_default=True)
@click.option("--intermediate", default=1408, show_default=True)
@click.option("--layers", default=2, show_default=True)
@click.option("--turns", default=3, show_default=True)
@click.option("--threads", default=0, help="OpenMP threads; 0: as many as cores.")
@click.option("--clock", type=click.Choice(["wall", "cpu"]), default="wall", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(registered, batch, tokens, hidden, intermediate, layers, turns, threads, clock, out):
    clocks = ("wall", "cpu").index(clock)
    with tempfile.TemporaryDirectory() as temporary:
        base = random_models.base(Path(temporary) / "base", hidden, intermediate, layers)
        count = len(random_models.shapes(base))
        adapters = [
            str(random_models.adapter(base, Path(temporary) / f"a{i}", random_models.draw_ranks(count, i), i))
            for i in range(registered)
        ]
        engine = Engine(
            {"LVNAS_RAGGED": "1", "OMP_NUM_THREADS": str(threads or os.cpu_count())},
            model=str(base),
            max_num_seqs=batch,
            max_model_len=64,
            max_num_batched_tokens=1024,
            enable_lora=True,
            max_loras=max(ACTIVE),
            max_cpu_loras=registered,
            max_lora_rank=64,
            enforce_eager=True,
        )
        everyone = [[1, folder] for folder in adapters]
        cold, warm = (engine.measure(everyone, 1) for _ in range(2))
        rows = {active: [] for active in ACTIVE}
        for _ in range(turns + 1):  # the first turn is a warm-up
            for active, taken in rows.items():
                chosen = [adapters[i % active] if active else None for i in range(batch)]
                taken.append(engine.measure([[1, folder] for folder in chosen], tokens))
        engine.close()
    curve = {
        active: batch * (tokens + 1) / statistics.median(turn[clocks] for turn in taken[1:])
        for active, taken in rows.items()
    }
    load = (cold[clocks] - warm[clocks]) / registered
    for active, speed in curve.items():
        print(f"{active:4} active: {speed:9.1f} tokens/s, {speed / curve[0]:.3f} of no adapter")
    print(f"{registered} registered; {load * 1e3:.2f} ms per cold load")
    config = {"registered": registered, "batch": batch, "tokens": tokens, "hidden": hidden, "clock": clock}
    config |= {"intermediate": intermediate, "layers": layers, "threads": threads or os.cpu_count()}
    config |= {"load average": os.getloadavg()}
    result = {"tokens per second": curve, "seconds per cold load": load}
    write_json(out, {"config": config, "result": result, "seconds": rows, "provenance": provenance()})


if __name__ == "__main__":
    main()
