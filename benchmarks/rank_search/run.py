"""Does the rank search find anything? Runs the suite and writes raw results with provenance.

    python benchmarks/rank_search/run.py --out benchmarks/results/rank_search/run

A run that was interrupted goes on where it stopped. `analyse.py` makes tables and plots of it.
"""

import argparse
import dataclasses
import json
import subprocess
import time
from pathlib import Path

import torch
from small_base import folder
from suite import Data, Settings, fresh_seeds, run_cell

from lvnas import bases, files

FULL = {
    "seeds": 5,
    "tasks": ["codewords", "inverted", "rotated", "inverted-codewords", "sum", "locate"],
    "steps": 300,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for settings.json and rows.jsonl")
    parser.add_argument("--base", help="any base of lvnas; by default the suite's own, see small_base.py")
    parser.add_argument("--full", action="store_true", help=f"the full size: {FULL}")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=JSON", help="change a setting")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    changes = FULL if arguments.full else {}
    changes = changes | {
        name: json.loads(text) for name, text in (item.split("=", 1) for item in arguments.set)
    }
    run(Settings(**changes), arguments.base or "small", arguments.out)


def run(settings: Settings, base: str, out: Path) -> None:
    seeds = fresh_seeds(settings)
    facts = {"settings": dataclasses.asdict(settings), "base": base, "seeds": seeds}
    rows = out / "rows.jsonl"
    if (out / "settings.json").exists():
        old = files.read_json(out / "settings.json")
        assert {name: old[name] for name in facts} == facts, f"{out} holds a run with other settings"
    else:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        made = files.provenance(commit=commit.stdout.strip(), threads=torch.get_num_threads())
        files.write_json(out / "settings.json", facts | {"provenance": made})
    done = set()
    if rows.exists():
        done = {(row["task"], row["seed"]) for row in map(json.loads, rows.read_text().splitlines())}
    model, processor = bases.load(str(folder()) if base == "small" else base, dtype=torch.float32)
    for seed in seeds:
        for task in settings.tasks:
            if (task, seed) in done:
                continue
            start = time.perf_counter()
            data = Data(task, processor, settings.examples)
            permuted = Data(task, processor, settings.examples, permuted=True)
            cell = [{"task": task} | row for row in run_cell(model, data, permuted, settings, seed)]
            old = rows.read_text() if rows.exists() else ""
            files.write_text(rows, old + "".join(json.dumps(row) + "\n" for row in cell))
            print(f"{task} seed {seed}: {len(cell)} rows in {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
