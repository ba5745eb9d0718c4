"""Speed and memory of `lvnas pack` against copying the same bytes and hashing them.

    python benchmarks/pack/bench.py --ranks published_ranks.json --out benchmarks/results/pack.json

Adapters have the shapes of Llama-3.2-11B-Vision (meta device, no download) and random bfloat16 values. Each round runs
the copy and the pack one after the other on the same disk, so that their ratio holds on a busy machine; the ratio
reported is the median over rounds of (copy seconds / pack seconds). The copy reads a file of the pack's size in 1 MiB
pieces, writes and hashes it, and flushes it to the disk, as the pack does.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lvnas import files
from lvnas.adapters import WEIGHTS_NAME, read_adapter
from lvnas.bases.shapes import linear_shapes
from lvnas.modules import find_targets, rank_pattern_key
from lvnas.pack import pack
from lvnas.prepare import PackOptions
from lvnas.ranks import RankPlan

BASE = "llama-3.2-11b-vision"
MEMORY = """
import sys
from pathlib import Path
from lvnas.adapters import read_adapter
from lvnas.pack import pack
from lvnas.prepare import PackOptions
pack([read_adapter(Path(sys.argv[1]))], Path(sys.argv[2]), PackOptions(layout=sys.argv[3]))
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(int(status["VmHWM"].split()[0]) * 1024)
"""


def make(folder: Path, ranks: dict[str, int], shapes: dict[str, tuple[int, int]]) -> Path:
    """A bfloat16 adapter of `ranks`, alpha = 2 * rank."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, rank in ranks.items():
        inputs, outputs = shapes[name]
        for part, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
            values = torch.randn(shape, generator=generator).to(torch.bfloat16)
            tensors[f"base_model.model.{name}.lora_{part}.weight"] = values
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": BASE,
        "r": max(ranks.values()),
        "lora_alpha": 2 * max(ranks.values()),
        "target_modules": list(ranks),
        "rank_pattern": {rank_pattern_key(name): rank for name, rank in ranks.items()},
        "alpha_pattern": {rank_pattern_key(name): 2 * rank for name, rank in ranks.items()},
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def copy_and_hash(source: Path, target: Path) -> float:
    """Seconds to copy `source`, hash it and flush the copy."""
    start, digest = time.perf_counter(), hashlib.sha256()
    with source.open("rb", buffering=0) as reader, target.open("wb", buffering=0) as writer:
        while piece := reader.read(1 << 20):
            writer.write(piece)
            digest.update(piece)
        os.fsync(writer.fileno())
    return time.perf_counter() - start


def measure(source: Path, layout: str, work: Path, rounds: int) -> dict[str, Any]:
    """Medians over `rounds` of packing `source`, and the peak memory of a process that does only that."""
    times: list[tuple[float, float]] = []
    size = 0
    for number in range(rounds + 1):  # the first round warms the page cache
        out = work / "pack"
        start = time.perf_counter()
        entry = pack([read_adapter(source)], out, PackOptions(layout=layout))["adapters"][0]
        packed = time.perf_counter() - start
        size = entry["bytes"]
        copied = copy_and_hash(out / entry["path"] / "adapter_model.safetensors", work / "copy")
        if number:
            times.append((packed, copied))
        shutil.rmtree(out)
        (work / "copy").unlink()
    run = [sys.executable, "-c", MEMORY, str(source), str(work / "pack"), layout]
    peak = int(subprocess.run(run, check=True, capture_output=True, text=True).stdout)
    shutil.rmtree(work / "pack")
    tensors = read_adapter(source).modules.values()
    largest = max(max(module.a.nbytes, module.b.nbytes) for module in tensors)
    return {
        "layout": layout,
        "input_bytes": (source / "adapter_model.safetensors").stat().st_size,
        "output_bytes": size,
        "pack_seconds": statistics.median(packed for packed, _ in times),
        "copy_seconds": statistics.median(copied for _, copied in times),
        "speed_of_copy": statistics.median(copied / packed for packed, copied in times),
        "rounds": [[round(packed, 4), round(copied, 4)] for packed, copied in times],
        "peak_bytes": peak,
        "largest_tensor_bytes": largest,
        "memory_limit_bytes": int(1.3 * largest) + 300 * 10**6,
    }


def measure_many(source: Path, counts: tuple[int, ...], rounds: int, work: Path) -> list[dict[str, Any]]:
    """Medians per adapter for runs of several sizes, with copies of as many files in turns.

    Processor time tells whether the work is linear; wall time also how the disk takes so many bytes.
    """
    times: dict[int, list[tuple[float, float, float]]] = {count: [] for count in counts}
    for _ in range(rounds):
        for count in counts:
            adapters = [read_adapter(source, f"a{index:03}") for index in range(count)]
            start, busy = time.perf_counter(), time.process_time()
            pack(adapters, work / "many", PackOptions(layout="ragged"))
            packed, busy = time.perf_counter() - start, time.process_time() - busy
            shutil.rmtree(work / "many")
            (work / "copies").mkdir()
            copied = sum(copy_and_hash(source / WEIGHTS_NAME, work / "copies" / a.name) for a in adapters)
            shutil.rmtree(work / "copies")
            times[count].append((packed / count, busy / count, copied / count))
    rows = []
    for count, found in times.items():
        packed, busy, copied = (statistics.median(column) for column in zip(*found, strict=True))
        ratio = statistics.median(copy / own for own, _, copy in found)
        rows.append(
            {
                "adapters": count,
                "bytes_each": (source / WEIGHTS_NAME).stat().st_size,
                "seconds_each": packed,
                "processor_seconds_each": busy,
                "copy_seconds_each": copied,
                "speed_of_copy": ratio,
                "rounds": [[round(value, 5) for value in row] for row in found],
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--ranks", type=Path, help="ranks of the mixed adapter; by default drawn from 4, 8, 16, 32, 64"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--many", type=int, nargs="*", default=[10, 50, 100])
    parser.add_argument(
        "--work", type=Path, help="folder on the disk to measure; by default the temporary one"
    )
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    from lvnas.bases import meta_model

    shapes = linear_shapes(BASE)
    names = list(find_targets(meta_model(BASE), "all"))
    draw = random.Random(0)
    mixed = (
        RankPlan.read(arguments.ranks).ranks
        if arguments.ranks
        else {n: draw.choice((4, 8, 16, 32, 64)) for n in names}
    )
    with tempfile.TemporaryDirectory(dir=arguments.work) as place:
        work = Path(place)
        sources = {
            "mixed": make(work / "mixed", mixed, shapes),
            "uniform-64": make(work / "uniform-64", dict.fromkeys(names, 64), shapes),
        }
        single = [
            {"adapter": name} | measure(source, layout, work, arguments.rounds)
            for name, source in sources.items()
            for layout in ("ragged", "pad")
        ]
        small = make(work / "small", dict.fromkeys(names[:80], 32), shapes)
        many = measure_many(small, tuple(arguments.many), 3, work)
    load = os.getloadavg()
    result = {
        "single": single,
        "many": many,
        "load_average": load,
        "provenance": files.provenance(ranks=str(arguments.ranks)),
    }
    files.write_json(arguments.out, result)
    for row in single:
        print(
            f"{row['adapter']} {row['layout']}: {row['output_bytes'] / 1e6:.0f} MB in {row['pack_seconds']:.3f} s, "
            f"{row['speed_of_copy']:.2f} of the copy's speed, peak {row['peak_bytes'] / 1e6:.0f} MB "
            f"(limit {row['memory_limit_bytes'] / 1e6:.0f} MB)"
        )
    for row in many:
        print(
            f"{row['adapters']} adapters of {row['bytes_each'] / 1e6:.1f} MB: {row['seconds_each'] * 1e3:.1f} ms each, "
            f"{row['processor_seconds_each'] * 1e3:.1f} ms of processor time, "
            f"{row['speed_of_copy']:.2f} of the copy's speed"
        )


if __name__ == "__main__":
    main()
