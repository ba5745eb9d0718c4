"""Does one budget for several adapters beat the same budget parted evenly? Raw rows, provenance and a table.

    python benchmarks/rank_search/joint.py --out benchmarks/results/rank_search/joint.json

Every task of the suite is searched, then all adapters together get the parameters of uniform rank 1: parted evenly
(`apart`), in one knapsack over the gains as they are (`joint`), or over gains scaled so that a task's add up to what
its search's training gained in nats per answer token (`nats`). A run that was interrupted goes on.
"""

import argparse
import dataclasses
import time
from pathlib import Path

import numpy as np
import torch
from small_base import folder
from suite import Data, Found, Plan, Settings, search_one, train_plans

from lvnas import bases, files
from lvnas.allocate import Budget, plan_ranks
from lvnas.joint import allocate_jointly

METHODS = ("score", "svd")
SETTINGS = Settings(pilot=True, random=0)
BUDGET = Budget(like_uniform=1)


def plans_of(gains: dict, gained: dict[str, float]) -> dict[str, dict[str, dict[str, int]]]:
    """Arm -> task -> ranks, for one method's gains by task."""
    weights = {task: gained[task] / one.totals()[:, -1].sum() for task, one in gains.items()}
    return {
        "apart": {task: plan_ranks(one, BUDGET) for task, one in gains.items()},
        "joint": allocate_jointly(gains, BUDGET),
        "nats": allocate_jointly(gains, BUDGET, weights=weights),
    }


def run_seed(model, processor, seed: int) -> list[dict]:
    """A row per task, method, arm and learning rate."""
    data = {task: Data(task, processor, SETTINGS, seed) for task in SETTINGS.tasks}
    arms: dict[tuple[str, str], dict[str, dict[str, int]]] = {}
    shapes: dict[str, tuple[int, int]] = {}
    for method in METHODS:
        found = {task: search_one(model, one, SETTINGS, seed, method, {}) for task, one in data.items()}
        gains = {task: one.gains for task, one in found.items()}
        shapes = next(iter(gains.values())).shapes
        gained = {task: _gained(model, data[task], found[task], seed) for task in found}
        print(seed, method, "nats gained by the search's training:", gained, flush=True)
        arms |= {(method, arm): plans for arm, plans in plans_of(gains, gained).items()}
    arms["uniform", "apart"] = {task: dict.fromkeys(shapes, 1) for task in data}
    rows = []
    for task, one in data.items():
        runs = [
            (Plan(method=method, start=arm, budget=1.0, ranks=plans[task], steps=SETTINGS.steps), rate)
            for (method, arm), plans in arms.items()
            for rate in SETTINGS.rates
        ]
        start = time.perf_counter()
        trained = train_plans(model, one, SETTINGS, seed, runs, shapes)
        rows += [{"task": task, **row} for row in trained]
        print(seed, task, f"{len(runs)} plans in {time.perf_counter() - start:.0f} s", flush=True)
    return rows


@torch.no_grad()
def _gained(model, data: Data, found: Found, seed: int) -> float:
    """The held-out loss that the search's own update takes away, in nats per answer token."""
    from population import Population

    highest = max(SETTINGS.ranks)
    plan = dict.fromkeys(found.update, highest)
    nothing = dict.fromkeys(found.update, 0)
    population = Population(model, [nothing, plan], [0.0, 0.0], seed=seed, starts=[None, found.update])
    before, after = population.evaluate(data.splits["search"], 64).tolist()
    population.close()
    return max(before - after, 0.0)


def summarise(rows: list[dict]) -> dict[str, dict[str, float]]:
    """Per method and arm: the mean test loss over tasks and seeds, and its difference from `apart`."""
    best: dict[tuple, dict] = {}
    for row in rows:
        key = (row["method"], row["start"], row["task"], row["seed"])
        if key not in best or row["validation"] < best[key]["validation"]:
            best[key] = row
    cells = sorted({key[2:] for key in best})
    losses = {
        pair: np.array([best[*pair, *cell]["test"] for cell in cells]) for pair in {key[:2] for key in best}
    }
    seeds = np.array([seed for _, seed in cells])
    table = {}
    for (method, arm), values in sorted(losses.items()):
        apart = losses[method, "apart"]
        by_seed = [float((values - apart)[seeds == seed].mean()) for seed in sorted(set(seeds))]
        parameters = [best[method, arm, *cell]["parameters"] for cell in cells]
        table[f"{method} {arm}"] = {
            "test": float(values.mean()),
            "- apart": float((values - apart).mean()),
            "- apart by seed": by_seed,
            "- apart by task": {
                task: float(
                    np.mean([v for v, cell in zip(values - apart, cells, strict=True) if cell[0] == task])
                )
                for task in SETTINGS.tasks
            },
            "parameters": float(np.mean(parameters)),
        }
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, processor = bases.load(str(folder()), dtype=torch.float32, attn_implementation="eager")
    rows = files.read_json(arguments.out)["rows"] if arguments.out.exists() else []
    for seed in range(100, 100 + arguments.seeds):
        if seed in {row["seed"] for row in rows}:
            continue
        rows += run_seed(model, processor, seed)
        made = files.provenance(settings=dataclasses.asdict(SETTINGS))
        files.write_json(arguments.out, {"table": summarise(rows), "rows": rows, "provenance": made})
    for name, row in summarise(rows).items():
        print(f"{name:16} test {row['test']:.3f}  - apart {row['- apart']:+.3f}  {row['- apart by seed']}")


if __name__ == "__main__":
    main()
