"""Tables and plots of one or more runs of the suite.

    python benchmarks/rank_search/analyse.py benchmarks/results/rank_search/first --plots docs/images

Of a plan's learning rates the one with the best search-validation loss counts; all comparisons are paired within a
cell (task, seed, budget); intervals are 95% percentile bootstraps that draw tasks first, then cells within a task.
"""

import argparse
import itertools
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

RESAMPLES = 1000
ORDER = (
    "score", "removal", "size", "uniform", "darts", "adalora", "eva", "text-only", "vision-only",
    "score-permuted", "score-inverted",
)  # fmt: skip


def read(folder: Path) -> dict:
    """(task, seed, budget) -> (method, start) -> the row at its best learning rate."""
    cells: dict = defaultdict(dict)
    for row in map(json.loads, (folder / "rows.jsonl").read_text().splitlines()):
        cell, key = cells[row["task"], row["seed"], row["budget"]], (row["method"], row["start"])
        if key not in cell or row["validation"] < cell[key]["validation"]:
            cell[key] = row
    return cells


def compare(cells: dict, budget: float) -> list[dict]:
    """Per method and start at a budget: losses against random plans and uniform ranks."""
    chosen = {key: cell for key, cell in cells.items() if key[2] == budget}
    table = []
    for name, start in [(n, s) for s in ("restart", "inherit") for n in ORDER]:
        rows = []
        for (task, _, _), cell in chosen.items():
            if (name, start) not in cell:
                continue
            draws = np.array([row["test"] for (m, s), row in cell.items() if m.startswith("random-")])
            loss = cell[name, start]["test"]
            uniform, same = cell["uniform", "restart"]["test"], cell["uniform", start]["test"]
            rows.append(
                (task, loss, loss - draws.mean(), loss - uniform, loss - same, 100 * (draws < loss).mean())
            )
        if not rows:
            continue
        entry = {"budget": budget, "method": name, "start": start, "cells": len(rows)}
        entry["loss"] = float(np.mean([row[1] for row in rows]))
        for place, what in (
            (2, "vs_random"),
            (3, "vs_uniform"),
            (4, "vs_uniform_same_start"),
            (5, "percentile"),
        ):
            entry[what] = interval([(row[0], row[place]) for row in rows])
        entry["below_random"] = float(np.mean([row[2] < 0 for row in rows]))
        entry["below_uniform"] = float(np.mean([row[3] < 0 for row in rows]))
        table.append(entry)
    return table


def interval(values: list[tuple[str, float]]) -> tuple[float, float, float]:
    """Mean and 95% interval by a bootstrap clustered by task."""
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


def agreement(cells: dict, method: str) -> tuple[float, float]:
    """Mean Spearman correlation of ranks between two seeds of a task, and between two tasks of a seed."""
    seeds, tasks = [], []
    plans = {
        key: cell[method, "restart"]["ranks"] for key, cell in cells.items() if (method, "restart") in cell
    }
    for (one, a), (two, b) in itertools.combinations(plans.items(), 2):
        if one[2] != two[2] or len(set(a)) == 1 or len(set(b)) == 1:
            continue
        value = spearmanr(a, b).statistic
        if one[0] == two[0]:
            seeds.append(value)
        elif one[1] == two[1]:
            tasks.append(value)
    return tuple(float(np.mean(v)) if v else float("nan") for v in (seeds, tasks))


def markdown(table: list[dict]) -> str:
    """The comparison as a Markdown table."""

    def cell(value: tuple[float, float, float], digits: int = 3) -> str:
        return f"{value[0]:+.{digits}f} [{value[1]:+.{digits}f}, {value[2]:+.{digits}f}]"

    lines = [
        "| budget | start | plan | test loss | - mean of random | - uniform, restarted | "
        "percentile in random | below random |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {e['budget']:g} | {e['start']} | {e['method']} | {e['loss']:.3f} | {cell(e['vs_random'])} | "
        f"{cell(e['vs_uniform'])} | {e['percentile'][0]:.0f} | {e['below_random']:.0%} of {e['cells']} |"
        for e in table
    ]
    return "\n".join(lines)


def plot(cells: dict, tables: list[list[dict]], folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(tables), figsize=(5.2 * len(tables) + 1, 4.6), squeeze=False, sharey=True
    )
    for axis, table in zip(axes[0], tables, strict=True):
        entries = table[::-1]
        labels = [e["method"] + (" (inherits)" if e["start"] == "inherit" else "") for e in entries]
        middle = np.array([e["vs_uniform"][0] for e in entries])
        ends = np.array([[e["vs_uniform"][1], e["vs_uniform"][2]] for e in entries]).T
        colours = ["tab:blue" if e["method"] in ("score", "removal", "size") else "0.45" for e in entries]
        axis.axvline(0, color="black", lw=0.8)
        axis.barh(labels, middle, color=colours, height=0.6, zorder=2)
        axis.errorbar(
            middle, labels, xerr=np.abs(ends - middle), fmt="none", color="black", lw=1, capsize=2, zorder=3
        )
        draws = [
            row["test"] - cell["uniform", "restart"]["test"]
            for key, cell in cells.items()
            if key[2] == table[0]["budget"]
            for (method, _), row in cell.items()
            if method.startswith("random-")
        ]
        low, high = np.percentile(draws, [10, 90])
        axis.axvspan(low, high, color="tab:orange", alpha=0.18, zorder=0, label="random plans, middle 80%")
        axis.set_title(f"budget: uniform rank {table[0]['budget']:g}")
        axis.set_xlabel("test loss - uniform's (nats; left is better)")
        axis.legend(loc="lower right", fontsize=8, frameon=False)
    figure.tight_layout()
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "rank_search.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders that run.py wrote")
    parser.add_argument("--plots", type=Path, help="folder for rank_search.png")
    arguments = parser.parse_args()
    cells: dict = {}
    for run in arguments.runs:
        cells |= read(run)
    tables = [compare(cells, budget) for budget in sorted({key[2] for key in cells})]
    print("\n\n".join(markdown(table) for table in tables))
    for method in ("score", "removal", "size", "darts", "adalora", "eva"):
        seeds, tasks = agreement(cells, method)
        print(f"\n{method}: rank correlation between seeds of a task {seeds:.2f}, between tasks {tasks:.2f}")
    seconds = defaultdict(list)
    for cell in cells.values():
        for (method, start), row in cell.items():
            if start == "restart" and row["search_seconds"]:
                seconds[method].append(row["search_seconds"] / row["train_seconds"])
    for method, shares in seconds.items():
        print(
            f"{method}: search / training of one plan in the population, processor time: {np.mean(shares):.2f}"
        )
    if arguments.plots:
        plot(cells, tables, arguments.plots)


if __name__ == "__main__":
    main()
