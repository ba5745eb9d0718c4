"""Does the rank search find anything? Runs the suite and writes raw results with provenance.

    python benchmarks/rank_search/run.py --out benchmarks/results/rank_search/run

`rows.jsonl` has a row per trained plan, `searches.jsonl` one per search. They are written cell by cell (a task and a
seed); a run that was interrupted goes on where it stopped. `analyse.py` makes tables and plots of it.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path

import torch
from small_base import folder
from suite import Data, Settings, fresh_seeds, run_cell

from lvnas import bases, files


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for settings.json and rows.jsonl")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=JSON", help="change a setting")
    parser.add_argument("--cells", type=int, help="stop after so many cells; 0 lists what is left")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    changes = {name: json.loads(text) for name, text in (item.split("=", 1) for item in arguments.set)}
    left = run(Settings(**changes), arguments.out, arguments.cells)
    print(f"{left} cells left", flush=True)


def run(settings: Settings, out: Path, cells: int | None = None) -> int:
    """Runs the cells that `out` does not have yet, `cells` of them at most; returns how many are left."""
    seeds = fresh_seeds(settings)
    facts = {"settings": dataclasses.asdict(settings), "seeds": seeds}
    rows = out / "rows.jsonl"
    if (out / "settings.json").exists():
        old = files.read_json(out / "settings.json")
        same = Settings(**old["settings"]) == settings and old["seeds"] == seeds
        assert same, f"{out} holds a run with other settings"
    else:
        made = files.provenance(threads=torch.get_num_threads())
        files.write_json(out / "settings.json", facts | {"provenance": made})
    done = set()
    if rows.exists():
        done = {(row["task"], row["seed"]) for row in map(json.loads, rows.read_text().splitlines())}
    missing = [(task, seed) for seed in seeds for task in settings.tasks if (task, seed) not in done]
    todo = missing[:cells]
    if todo:
        model, processor = bases.load(str(folder()), dtype=torch.float32, attn_implementation="eager")
    for task, seed in todo:
        start = time.perf_counter()
        data = Data(task, processor, settings, seed)
        searches, trained = run_cell(model, data, settings, seed)
        append(out / "searches.jsonl", task, searches)
        append(rows, task, trained)
        print(f"{task} seed {seed}: {len(trained)} rows in {time.perf_counter() - start:.0f} s", flush=True)
    return len(missing) - len(todo)


def append(path: Path, task: str, rows: list[dict]) -> None:
    old = path.read_text() if path.exists() else ""
    files.write_text(path, old + "".join(json.dumps({"task": task} | row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
