"""Tables of one or more runs of the suite: every comparison, every control, every goal.

    python benchmarks/rank_search/analyse.py benchmarks/results/rank_search/confirm-* --plots docs/images \
        --page docs/search-evidence.md

A plan's loss is the mean of its repeats; of its learning rates the one with the best search-validation loss counts. All
comparisons are paired within a cell (task, seed, budget); intervals are 95% percentile bootstraps that draw tasks
first, then cells within a task.
"""

import argparse
import itertools
import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import contributions
import curves
import goals
import numpy as np
from goals import show
from scipy.stats import rankdata, t

from lvnas import files

RESAMPLES = 4000
ORDER = (
    "score", "svd", "uniform", "darts", "darts-long", "adalora", "eva", "text-only", "vision-only",
    "score-permuted", "score-inverted", "darts-permuted", "darts-inverted",
)  # fmt: skip
BEGIN, END = "<!-- analyse.py: begin -->", "<!-- analyse.py: end -->"

Cells = dict[tuple[str, int, float], dict[tuple[str, str], dict]]


def read_rows(folders: Iterable[Path]) -> Cells:
    """(task, seed, budget) -> (method, start) -> the row at its best learning rate, losses averaged over repeats."""
    repeats: dict[tuple, list[dict]] = defaultdict(list)
    for folder in folders:
        for row in map(json.loads, (folder / "rows.jsonl").read_text().splitlines()):
            cell = row["task"], row["seed"], row["budget"]
            repeats[cell, (row["method"], row["start"]), row["rate"]].append(row)
    cells: Cells = defaultdict(dict)
    for (cell, key, _), rows in repeats.items():
        mean = {name: sum(row[name] for row in rows) / len(rows) for name in ("validation", "test")}
        best = cells[cell].get(key)
        if best is None or mean["validation"] < best["validation"]:
            cells[cell][key] = rows[0] | mean | {"repeats": [row["test"] for row in rows]}
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


def t_interval(by_task: dict[str, float]) -> tuple[float, float]:
    """95% interval of the mean over tasks from their means alone; with four tasks a bootstrap's is too narrow."""
    values = list(by_task.values())
    half = (
        t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
        if len(values) > 1
        else np.inf
    )
    return float(np.mean(values) - half), float(np.mean(values) + half)


def random_losses(cell: dict, start: str = "restart") -> np.ndarray:
    return np.array(
        [row["test"] for (m, how), row in cell.items() if m.startswith("random-") and how == start]
    )


def compare(cells: Cells, budget: float) -> list[dict]:
    """Per method and start at a budget: losses against uniform ranks and random plans that start alike.

    Where no such random plans ran, those that restart stand in; where they ran in some cells, those count.
    """
    chosen = {key: cell for key, cell in cells.items() if key[2] == budget and len(random_losses(cell))}
    table = []
    for start, name in itertools.product(("restart", "charged", "inherit"), ORDER):
        alike = start if any(len(random_losses(cell, start)) for cell in chosen.values()) else "restart"
        rows = []
        for (task, _, _), cell in chosen.items():
            if (name, start) not in cell:
                continue
            draws, loss = random_losses(cell, alike), cell[name, start]["test"]
            same = ("uniform", start)
            uniform = cell[same if same in cell else ("uniform", "restart")]["test"]
            rows.append({"task": task, "loss": loss, "vs_uniform": loss - uniform})
            if len(draws):
                rows[-1] |= {"vs_random": loss - draws.mean(), "percentile": 100 * (draws < loss).mean()}
                rows[-1] |= {"worse_than_all": float(loss > draws.max())}
        if not rows:
            continue
        entry: dict = {"budget": budget, "method": name, "start": start, "cells": len(rows)}
        entry["random_start"] = alike
        for what in ("loss", "vs_random", "vs_uniform", "percentile", "worse_than_all"):
            entry[what] = interval([(row["task"], row[what]) for row in rows if what in row])
        entry["below_random"] = [row["vs_random"] < 0 for row in rows if "vs_random" in row]
        by_task = {task: [r["vs_uniform"] for r in rows if r["task"] == task] for task, _, _ in chosen}
        entry["vs_uniform_by_task"] = {
            task: float(np.mean(values)) for task, values in by_task.items() if values
        }
        entry["t_interval"] = t_interval(entry["vs_uniform_by_task"])
        table.append(entry)
    return table


def spread(cells: Cells, budget: float) -> tuple[float, float]:
    """Standard deviation between the trainings of one random plan, and between random plans' means, over all cells."""
    within, between = [], []
    for key, cell in cells.items():
        rows = [
            row for (method, how), row in cell.items() if method.startswith("random-") and how == "restart"
        ]
        if key[2] == budget and rows:
            within += [np.var(row["repeats"], ddof=1) for row in rows if len(row["repeats"]) > 1]
            between.append(np.var([row["test"] for row in rows], ddof=1))
    return float(np.mean(within or [np.nan]) ** 0.5), float(np.mean(between) ** 0.5)


def against(cells: Cells, budget: float, other: str) -> tuple[float, float, float]:
    """`score` minus another method, both restarting."""
    return interval(
        [
            (key[0], cell["score", "restart"]["test"] - cell[other, "restart"]["test"])
            for key, cell in cells.items()
            if key[2] == budget and ("score", "restart") in cell and (other, "restart") in cell
        ]
    )


def module_sizes(cells: Cells) -> np.ndarray:
    """Parameters per rank of every module [N], which the plans' ranks and parameters tell."""
    rows = [row for cell in cells.values() for row in cell.values()]
    ranks = np.array([row["ranks"] for row in rows], dtype=np.float64)
    return np.linalg.lstsq(ranks, [row["parameters"] for row in rows])[0].round().astype(int)


def agreement(searches: dict, method: str, sizes: np.ndarray) -> tuple[float, float]:
    """Mean correlation of the modules' scores between seeds of a task, and between tasks.

    Of their ranks among the modules of one size: a gain per parameter orders modules by size alone where gains are
    alike, and that would agree always.
    """
    seeds, tasks = [], []
    scores = {key[1:]: _ranks_within(values, sizes) for key, values in searches.items() if key[0] == method}
    for (one, a), (two, b) in itertools.combinations(scores.items(), 2):
        same = one[0] == two[0]
        (seeds if same else tasks).append(np.corrcoef(a, b)[0, 1])
    return float(np.mean(seeds or [np.nan])), float(np.mean(tasks or [np.nan]))


def _ranks_within(scores: list[float], sizes: np.ndarray) -> np.ndarray:
    ranks = np.zeros(len(scores))
    for size in set(sizes.tolist()):
        places = rankdata(np.array(scores)[sizes == size])
        ranks[sizes == size] = places - places.mean()
    return ranks


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
        f"{e['percentile'][0]:.0f} | {np.mean(e['below_random']):.0%} of {len(e['below_random'])} |"
        for e in table
    ]
    return "\n".join(lines)


def report(cells: Cells, searches: dict, cost: Path | None) -> str:
    """The comparisons of one setting, as Markdown.

    Args:
        cells: from `read_rows`.
        searches: from `read_searches`.
        cost: what `search_cost.py` wrote; the goals are left out without it.
    """
    methods = {key[0] for key in searches}
    sizes = module_sizes(cells)
    agreements = {m: agreement(searches, m, sizes) for m in ORDER if m in methods}
    parts = []
    for budget in sorted({key[2] for key in cells}):
        table = compare(cells, budget)
        done: dict[str, int] = defaultdict(int)
        for task, _, at in cells:
            done[task] += at == budget
        count = ", ".join(f"{task} {number}" for task, number in done.items() if number)
        parts.append(f"**Budget: uniform rank {budget:g}.** Seeds: {count}.")
        if cost:
            rows = goals.goals(
                table, lambda other, budget=budget: against(cells, budget, other), agreements, cost
            )
            parts.append(goals.markdown(rows))
        parts.append(markdown(table))
        by_task = next(e for e in table if (e["method"], e["start"]) == ("score", "restart"))
        tasks = ", ".join(f"{task} {value:+.3f}" for task, value in by_task["vs_uniform_by_task"].items())
        within, between = spread(cells, budget)
        parts.append(
            f"`score` - uniform by task, both restarting: {tasks}. Standard deviation between two trainings of one "
            f"random plan {within:.3f}, between the random plans of a cell {between:.3f}."
        )
    correlations = "; ".join(f"{m} {seeds:.2f} ({tasks:.2f})" for m, (seeds, tasks) in agreements.items())
    if len({key[1] for key in cells}) == 1:  # one seed agrees with none
        return "\n\n".join(parts)
    parts.append(
        f"Rank correlation of the modules' scores, among modules of one size, between seeds of a task (between tasks): "
        f"{correlations}."
    )
    modules = contributions.report(cells, searches, [m for m in ORDER if m in methods])
    if modules:
        parts.append(
            f"What the random plans' losses say of each module, as a regression (`contributions.py`):\n\n{modules}"
        )
    return "\n\n".join(parts)


def write_page(page: Path, text: str) -> None:
    """Puts `text` between the page's two marks."""
    before, _, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    assert end, f"{page} needs {BEGIN} and {END}"
    files.write_text(page, f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders that run.py wrote")
    parser.add_argument("--plots", type=Path, help="folder for rank_search.png and rank_search_curve.png")
    parser.add_argument("--page", type=Path, help="page to put the tables in, between its marks")
    arguments = parser.parse_args()
    settings = {run: files.read_json(run / "settings.json")["settings"] for run in arguments.runs}
    # Plans are compared among those of the same space, length and learning rates only; curves have rates of their own.
    comparisons: dict[str, list[Path]] = defaultdict(list)
    lines: dict[str, list[Path]] = defaultdict(list)
    for run, made in settings.items():
        name = f"Ranks {', '.join(map(str, made['ranks']))}; {made['steps']} steps"
        if made["random"]:
            comparisons[f"{name}; rates {', '.join(map(str, made['rates']))}"].append(run)
        if made["curve"]:
            lines[name].append(run)
    first = next(iter(comparisons), None)
    for run, made in settings.items():
        if not made["random"] and not made["curve"]:  # further plans for the cells of the first
            comparisons[first].append(run)
    compared = {name: read_rows(runs) for name, runs in comparisons.items()}
    found = {name: curves.read(read_rows(runs)) for name, runs in lines.items()}
    parts = []
    for name, cells in compared.items():
        cost = arguments.runs[0].parent / "cost.json" if name == first else None
        parts += [f"### {name}", report(cells, read_searches(comparisons[name]), cost)]
    for name, of_tasks in found.items():
        parts += [f"### Along the budget: {name[0].lower()}{name[1:]}", curves.report(of_tasks)]
    text = "\n\n".join(parts)
    print(text)
    if arguments.page:
        write_page(arguments.page, text)
    if arguments.plots:
        import plots

        cells = compared[first]
        tables = [compare(cells, budget) for budget in sorted({key[2] for key in cells})]
        plots.comparison(cells, tables, arguments.plots / "rank_search.png")
        plots.curves(found, arguments.plots / "rank_search_curve.png")


if __name__ == "__main__":
    main()
