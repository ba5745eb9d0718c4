"""CPU throughput of ragged against stock LoRA and against no adapter: python benchmarks/ragged_lora/throughput.py

Two engines take turns in one run, workload by workload and round by round; within the ragged engine, requests
with mixed ranks, with uniform 64 and without adapter take turns too. Ratios are medians of per-round ratios.
On a machine that other work shares, `--threads 1 --clock cpu` compares processor time, which waiting for a core
does not count.
"""

import os
import statistics
import tempfile
from pathlib import Path

import click
import random_models
import torch
from engine import Engine

from lvnas.files import provenance, write_json

COLUMNS = ("ragged none", "ragged mixed", "ragged u64", "stock mixed", "stock u64", "compiled none")
WORKLOADS = {"prefill-heavy": (64, 2), "decode-heavy": (8, 24), "near-pure decode": (1, 32)}
"""Name -> (prompt tokens, new tokens) of each of the requests, one per adapter."""


@click.command()
@click.option("--adapters", default=16, show_default=True)
@click.option("--hidden", default=2048, show_default=True)
@click.option("--intermediate", default=5632, show_default=True)
@click.option("--layers", default=4, show_default=True)
@click.option("--rounds", default=3, show_default=True, help="Rounds of the stock columns.")
@click.option("--inner", default=3, show_default=True, help="Turns of the ragged columns per round.")
@click.option("--threads", default=0, help="OpenMP threads of each engine; 0: as many as cores.")
@click.option("--stock/--no-stock", default=True, help="Without the stock engine: the paired ratios alone.")
@click.option("--graphs/--eager", default=False, help="Let the LoRA engines compile and capture CUDA graphs.")
@click.option("--clock", type=click.Choice(["wall", "cpu"]), default="wall", show_default=True)
@click.option("--ranks", type=click.Path(path_type=Path), help="JSON of ranks to draw from.")
@click.option("--compiled-base/--no-compiled-base", default=False, help="Also a base engine that compiles.")
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(
    adapters,
    hidden,
    intermediate,
    layers,
    rounds,
    inner,
    threads,
    stock,
    graphs,
    clock,
    ranks,
    compiled_base,
    out,
):
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        base = random_models.base(folder / "base", hidden, intermediate, layers)
        count = len(random_models.shapes(base))
        drawn = [random_models.draw_ranks(count, seed, ranks) for seed in range(adapters)]
        mixed = [random_models.adapter(base, folder / f"mixed-{i}", drawn[i], i) for i in range(adapters)]
        u64 = [random_models.adapter(base, folder / f"u64-{i}", [64] * count, i) for i in range(adapters)]
        folders = {"none": [None] * adapters, "mixed": list(map(str, mixed)), "u64": list(map(str, u64))}
        common = {"model": str(base), "max_num_seqs": adapters, "max_model_len": 256}
        common["max_num_batched_tokens"] = 1024
        if torch.cuda.is_available():
            common["gpu_memory_utilization"] = 0.25  # up to three engines side by side
        lora = {"enable_lora": True, "max_loras": adapters, "max_lora_rank": 64, "enforce_eager": not graphs}
        cores, plain = {"OMP_NUM_THREADS": str(threads or os.cpu_count())}, {"VLLM_PLUGINS": ""}
        lora["max_cpu_loras"] = 2 * adapters
        engines = {"ragged": Engine({"LVNAS_RAGGED": "1"} | cores, **common, **lora)}
        if stock:
            engines["stock"] = Engine(plain | cores, **common, **lora)
        if compiled_base:
            engines["compiled"] = Engine(plain | cores, **common)
        mean = statistics.mean(rank for one in drawn for rank in one)
        wanted = [column for column in COLUMNS if column.split()[0] in engines]
        seconds = take_turns(engines, folders, rounds, inner, wanted)
        for engine in engines.values():
            engine.close()
    clocked = {
        w: {c: [t[clock == "cpu"] for t in taken] for c, taken in row.items()} for w, row in seconds.items()
    }
    result = summarise(clocked, adapters)
    print_table(result)
    config = {"adapters": adapters, "hidden": hidden, "intermediate": intermediate, "layers": layers}
    config |= {"mean rank": mean, "rounds": rounds, "inner": inner, "ranks": "file" if ranks else "uniform"}
    config |= {
        "workloads": WORKLOADS,
        "dtype": "bfloat16",
        "threads": threads or os.cpu_count(),
        "clock": clock,
    }
    config["load average"] = os.getloadavg()
    write_json(out, {"config": config, "result": result, "seconds": seconds, "provenance": provenance()})


def take_turns(engines, folders, rounds, inner, wanted):
    """Seconds of every turn: workload -> column -> list. The first turn of each column is a warm-up."""
    seconds = {workload: {column: [] for column in wanted} for workload in WORKLOADS}

    def turn(workload, column):
        engine, adapters = column.split()
        length, tokens = WORKLOADS[workload]
        return engines[engine].measure([[length, folder] for folder in folders[adapters]], tokens)

    for column in wanted:
        turn("near-pure decode", column)
    for workload, columns in seconds.items():
        for column in columns:
            if not column.startswith("stock"):
                turn(workload, column)
        for _ in range(rounds):
            for column in columns:
                if column.startswith("stock"):
                    columns[column].append(turn(workload, column))
            for _ in range(inner):
                for column in columns:
                    if not column.startswith("stock"):
                        columns[column].append(turn(workload, column))
            print(workload, columns, flush=True)
    return seconds


def summarise(seconds, adapters):
    """Tokens per second of each column (median), and the ratios that the goals name."""
    result = {}
    for workload, columns in seconds.items():
        tokens = adapters * sum(WORKLOADS[workload])
        speed = {column: tokens / statistics.median(taken) for column, taken in columns.items()}
        pairs = zip(columns["ragged none"], columns["ragged mixed"], columns["ragged u64"], strict=True)
        ratios = [(none / mixed, none / u64) for none, mixed, u64 in pairs]
        result[workload] = {
            "tokens per second": speed,
            "ragged mixed / no adapter": statistics.median(mixed for mixed, _ in ratios),
            "ragged u64 / no adapter": statistics.median(u64 for _, u64 in ratios),
        }
        for other in {"stock u64", "stock mixed", "compiled none"} & speed.keys():
            for ours in ("ragged mixed", "ragged u64"):
                result[workload][f"{ours} / {other}"] = speed[ours] / speed[other]
    return result


def print_table(result):
    for workload, row in result.items():
        print(workload)
        for name, value in {**row["tokens per second"], **row}.items():
            if isinstance(value, dict):
                continue
            print(f"  {name:28} {value:10.3f}")


if __name__ == "__main__":
    main()
