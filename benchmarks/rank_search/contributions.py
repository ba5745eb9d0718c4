"""What the random plans say of each module, and how well a search's gains agree with it.

Legend: N modules, P random plans of a task over all its seeds.

Random plans of one budget differ in nothing but where their ranks are. A ridge regression of the logarithm of their
losses on log2(1 + rank) of every module gives each module a contribution: how much less loss there is for more rank in
it, at the expense of an average other module. No search is involved, so that it can judge them all.
"""

from collections import defaultdict

import numpy as np
from scipy.stats import spearmanr

RIDGE = 20.0
"""In units of the squared spread of log2(1 + rank)."""


def random_plans(cells: dict, budget: float, task: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Per seed: log2(1 + rank) [plans, N] and log loss [plans] of its random plans that restart, both around their
    means."""
    seeds = []
    for (of, _, at), cell in sorted(cells.items()):
        rows = [r for (m, start), r in cell.items() if m.startswith("random-") and start == "restart"]
        if (of, at) == (task, budget) and rows:
            x = np.log2(1 + np.array([row["ranks"] for row in rows], dtype=np.float64))
            y = np.log([row["test"] for row in rows])
            seeds.append((x - x.mean(axis=0), y - y.mean()))
    return seeds


def fit(seeds: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Contribution of every module [N]: minus the coefficients of the regression."""
    x, y = (np.concatenate(parts) for parts in zip(*seeds, strict=True))
    return -np.linalg.solve(x.T @ x + RIDGE * x.var() * np.eye(x.shape[1]), x.T @ y)


def predicted(seeds: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """Correlation of the losses of each seed's plans with what the other seeds' contributions predict for them."""
    pairs = [(-x @ fit(seeds[:i] + seeds[i + 1 :]), y) for i, (x, y) in enumerate(seeds)]
    one, other = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
    return float(np.corrcoef(one, other)[0, 1])


def report(cells: dict, searches: dict, methods: list[str]) -> str:
    """Correlations with contributions by task, as Markdown; means over budgets, and of a search's over seeds as well.

    The first row tells how well contributions predict the losses of a seed that they have not seen; the others
    correlate the ranks of a search's gains per parameter with them.
    """
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for task, budget in sorted({(task, budget) for task, _, budget in cells}):
        seeds = random_plans(cells, budget, task)
        if len(seeds) < 2:
            continue
        truth = fit(seeds)
        found["losses of unseen random plans"][task].append(predicted(seeds))
        for (method, of, _), scores in searches.items():
            if of == task and method in methods:
                found[f"gains of {method}"][task].append(spearmanr(scores, truth)[0])
    tasks = list(next(iter(found.values()), {}))
    lines = ["| correlation with contributions | " + " | ".join(tasks) + " | mean |"]
    lines.append("|---" * (len(tasks) + 2) + "|")
    for name, by_task in found.items():
        numbers = [np.mean(by_task[task]) for task in tasks]
        lines.append(f"| {name} | " + " | ".join(f"{n:.2f}" for n in [*numbers, np.mean(numbers)]) + " |")
    return "\n".join(lines) if tasks else ""
