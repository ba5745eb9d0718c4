"""Tables of one or more runs of the suite: every comparison, every control, every goal.

    python benchmarks/rank_search/analyse.py benchmarks/results/rank_search/confirm-* --plots docs/images

Of a plan's learning rates the one with the best search-validation loss counts; all comparisons are paired within a
cell (task, seed, budget); intervals are 95% percentile bootstraps that draw tasks first, then cells within a task.
"""

import argparse
import itertools
import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

RESAMPLES = 4000
ORDER = (
    "score", "svd", "uniform", "darts", "adalora", "eva", "text-only", "vision-only",
    "score-permuted", "score-inverted", "darts-permuted", "darts-inverted",
)  # fmt: skip
SLACK = 0.02
"""Nats above the best uniform rank that are still sufficient."""

Cells = dict[tuple[str, int, float], dict[tuple[str, str], dict]]


def read_rows(folders: Iterable[Path]) -> Cells:
    """(task, seed, budget) -> (method, start) -> the row at its best learning rate."""
    cells: Cells = defaultdict(dict)
    for folder in folders:
        for row in map(json.loads, (folder / "rows.jsonl").read_text().splitlines()):
            cell, key = cells[row["task"], row["seed"], row["budget"]], (row["method"], row["start"])
            if key not in cell or row["validation"] < cell[key]["validation"]:
                cell[key] = row
    return cells


def read_searches(folders: Iterable[Path]) -> dict[tuple[str, str, int], list[float]]:
    """(method, task, seed) -> gain per parameter of each module."""
    lines = (line for f in folders for line in (f / "searches.jsonl").read_text().splitlines())
    return {(row["method"], row["task"], row["seed"]): row["scores"] for row in map(json.loads, lines)}


def interval(values: list[tuple[str, float]]) -> tuple[float, float, float]:
    """Mean over tasks and its 95% interval by a bootstrap clustered by task."""
    by_task = defaultdict(list)
    for task, value in values:
        by_task[task].append(value)
    groups = list(by_task.values())
    random = np.random.default_rng(0)
    means = []
    for _ in range(RESAMPLES):
        tasks = random.integers(len(groups), size=len(groups))
        means.append(np.mean([np.mean(random.choice(groups[t], len(groups[t]))) for t in tasks]))
    mean = float(np.mean([np.mean(group) for group in groups]))
    return mean, float(np.percentile(means, 2.5)), float(np.percentile(means, 97.5))


def random_losses(cell: dict) -> np.ndarray:
    return np.array([row["test"] for (method, _), row in cell.items() if method.startswith("random-")])


def compare(cells: Cells, budget: float) -> list[dict]:
    """Per method and start at a budget: losses against random plans and uniform ranks."""
    chosen = {key: cell for key, cell in cells.items() if key[2] == budget and len(random_losses(cell))}
    table = []
    for start, name in itertools.product(("restart", "charged", "inherit"), ORDER):
        rows = []
        for (task, _, _), cell in chosen.items():
            if (name, start) not in cell:
                continue
            draws, loss = random_losses(cell), cell[name, start]["test"]
            same = ("uniform", start)
            uniform = cell[same if same in cell else ("uniform", "restart")]["test"]
            rows.append(
                {
                    "task": task,
                    "loss": loss,
                    "vs_random": loss - draws.mean(),
                    "vs_uniform": loss - uniform,
                    "percentile": 100 * (draws < loss).mean(),
                    "worse_than_all": float(loss > draws.max()),
                }
            )
        if not rows:
            continue
        entry: dict = {"budget": budget, "method": name, "start": start, "cells": len(rows)}
        for what in ("loss", "vs_random", "vs_uniform", "percentile", "worse_than_all"):
            entry[what] = interval([(row["task"], row[what]) for row in rows])
        entry["below_random"] = float(np.mean([row["vs_random"] < 0 for row in rows]))
        by_task = {task: [r["vs_uniform"] for r in rows if r["task"] == task] for task, _, _ in chosen}
        entry["vs_uniform_by_task"] = {task: float(np.mean(values)) for task, values in by_task.items()}
        table.append(entry)
    return table


def against(cells: Cells, budget: float, other: str) -> tuple[float, float, float]:
    """`score` minus another method, both restarting."""
    return interval(
        [
            (key[0], cell["score", "restart"]["test"] - cell[other, "restart"]["test"])
            for key, cell in cells.items()
            if key[2] == budget and ("score", "restart") in cell and (other, "restart") in cell
        ]
    )


def agreement(searches: dict, method: str) -> tuple[float, float]:
    """Mean Spearman correlation of the modules' scores between seeds of a task, and between tasks."""
    seeds, tasks = [], []
    scores = {key[1:]: values for key, values in searches.items() if key[0] == method}
    for (one, a), (two, b) in itertools.combinations(scores.items(), 2):
        same = one[0] == two[0]
        (seeds if same else tasks).append(spearmanr(a, b).statistic)
    return float(np.mean(seeds or [np.nan])), float(np.mean(tasks or [np.nan]))


def curve(cells: Cells, method: str) -> dict[str, dict[float, float]]:
    """Task -> budget -> mean test loss of `method`, restarting, over the seeds that have the uniform curve."""
    seeds = {key[:2] for key, cell in cells.items() if key[2] >= 16 and ("uniform", "restart") in cell}
    losses: dict = defaultdict(lambda: defaultdict(list))
    for (task, seed, budget), cell in cells.items():
        if (task, seed) in seeds and (method, "restart") in cell:
            losses[task][budget].append(cell[method, "restart"]["test"])
    return {
        task: {budget: float(np.mean(values)) for budget, values in sorted(by.items())}
        for task, by in losses.items()
    }


def needed(losses: dict[float, float], goal: float) -> float:
    """The smallest budget at which the curve is at `goal`, log-linear between the measured ones; inf if none."""
    points = list(losses.items())
    for (low, above), (high, below) in itertools.pairwise(points):
        if above <= goal:
            return low
        if below <= goal:
            return float(low * (high / low) ** ((above - goal) / (above - below)))
    return points[-1][0] if points and points[-1][1] <= goal else float("inf")


def compression(cells: Cells) -> list[dict]:
    """Per task: the smallest sufficient uniform rank, and the budget at which `score` reaches its loss."""
    rows = []
    scored = curve(cells, "score")
    for task, uniform in curve(cells, "uniform").items():
        whole = {rank: loss for rank, loss in uniform.items() if rank >= 1}
        enough = min(rank for rank, loss in whole.items() if loss <= min(whole.values()) + SLACK)
        found = needed(scored.get(task, {}), whole[enough])
        rows.append({"task": task, "uniform": whole, "score": scored.get(task, {}), "sufficient": enough})
        rows[-1] |= {"needed": found, "share": found / enough, "below_uniform_64": 64 / found}
    return rows


def show(value: tuple[float, float, float], digits: int = 3) -> str:
    return f"{value[0]:+.{digits}f} [{value[1]:+.{digits}f}, {value[2]:+.{digits}f}]"


def markdown(table: list[dict]) -> str:
    """The comparison as a Markdown table."""
    lines = [
        "| budget | start | plan | test loss | - mean of random | - uniform, same start | worst task | "
        "percentile in random | below random |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {e['budget']:g} | {e['start']} | {e['method']} | {e['loss'][0]:.3f} | {show(e['vs_random'])} | "
        f"{show(e['vs_uniform'])} | {max(e['vs_uniform_by_task'].values()):+.3f} | "
        f"{e['percentile'][0]:.0f} | {e['below_random']:.0%} of {e['cells']} |"
        for e in table
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders that run.py wrote")
    parser.add_argument("--plots", type=Path, help="folder for rank_search.png and rank_search_curve.png")
    arguments = parser.parse_args()
    cells, searches = read_rows(arguments.runs), read_searches(arguments.runs)
    tables = [compare(cells, budget) for budget in sorted({key[2] for key in cells})]
    tables = [table for table in tables if table]
    for table in tables:
        print(markdown(table), end="\n\n")
        budget = table[0]["budget"]
        for other in ("adalora", "eva", "darts", "svd"):
            print(f"budget {budget:g}: score - {other}: {show(against(cells, budget, other))}")
        for entry in table:
            if entry["method"] in ("score-inverted", "darts-inverted"):
                print(f"{entry['method']}: worse than every random plan in {entry['worse_than_all'][0]:.0%}")
            if entry["method"] == "score":
                print(entry["start"], {task: round(v, 3) for task, v in entry["vs_uniform_by_task"].items()})
        print()
    for method in ("score", "svd", "darts", "adalora", "eva", "score-permuted"):
        seeds, tasks = agreement(searches, method)
        print(f"{method}: rank correlation of scores between seeds {seeds:.2f}, between tasks {tasks:.2f}")
    for row in compression(cells):
        print(json.dumps(row))
    if arguments.plots:
        import plots

        plots.comparison(cells, tables, arguments.plots / "rank_search.png")
        plots.curves(compression(cells), arguments.plots / "rank_search_curve.png")


if __name__ == "__main__":
    main()
