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
    """Per budget and task, as Markdown: how well the contributions predict the plans of a seed that they have not seen,
    and the mean rank correlation over seeds between a search's gains per parameter and them."""
    budgets, tasks = ([*dict.fromkeys(key[i] for key in cells)] for i in (2, 0))
    found: dict[str, dict] = defaultdict(dict)
    for budget in sorted(budgets):
        for task in tasks:
            seeds = random_plans(cells, budget, task)
            if len(seeds) < 2:
                continue
            truth = fit(seeds)
            found["(the regression, on unseen plans)"][budget, task] = predicted(seeds)
            for method in methods:
                scores = [s for (m, of, _), s in searches.items() if (m, of) == (method, task)]
                if scores:
                    found[method][budget, task] = np.mean([spearmanr(s, truth)[0] for s in scores])
    columns = list(next(iter(found.values()), {}))
    if not columns:
        return ""
    lines = [
        "| gains of | " + " | ".join(f"{task}, {budget:g}" for budget, task in columns) + " | mean |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for name, values in found.items():
        numbers = [values[column] for column in columns if column in values]
        lines.append(
            f"| {name} | " + " | ".join(f"{v:.2f}" for v in numbers) + f" | {np.mean(numbers):.2f} |"
        )
    return "\n".join(lines)
