"""How many parameters `score` needs to reach the loss of each uniform rank; `analyse.py` prints it."""

import itertools
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

SLACK = 0.02
"""Nats above the best uniform rank that are still sufficient."""


@dataclass(kw_only=True, slots=True)
class Curve:
    """Mean test losses of a task along the budget, both restarting."""

    task: str
    seeds: int
    uniform: dict[float, float]
    """Rank -> loss."""
    score: dict[float, float]
    """Budget, in uniform ranks -> loss."""

    @property
    def sufficient(self) -> float:
        """The smallest uniform rank whose loss is at most `SLACK` above the best one's."""
        return min(rank for rank, loss in self.uniform.items() if loss <= min(self.uniform.values()) + SLACK)

    def needed(self, rank: float) -> float:
        """The smallest budget at which `score` has this uniform rank's loss, log-linear between those that ran.

        The smallest that ran where it is there already; inf where none reaches it.
        """
        goal, points = self.uniform[rank], list(self.score.items())
        if points[0][1] <= goal:
            return points[0][0]
        for (low, above), (high, below) in itertools.pairwise(points):
            if below <= goal:
                return float(low * (high / low) ** ((above - goal) / (above - below)))
        return float("inf")


def read(cells: dict[tuple[str, int, float], dict[tuple[str, str], dict]]) -> list[Curve]:
    """Each task's curves, from `analyse.read_rows`."""
    losses: dict = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    seeds = defaultdict(set)
    for (task, seed, budget), cell in cells.items():
        seeds[task].add(seed)
        for method in ("uniform", "score"):
            if (method, "restart") in cell:
                losses[task][method][budget].append(cell[method, "restart"]["test"])
    return [
        Curve(
            task=task,
            seeds=len(seeds[task]),
            uniform={b: float(np.mean(v)) for b, v in sorted(by["uniform"].items()) if b >= 1},
            score={b: float(np.mean(v)) for b, v in sorted(by["score"].items())},
        )
        for task, by in losses.items()
    ]


def report(curves: list[Curve]) -> str:
    """The tables of one space and number of steps, as Markdown."""
    budgets = sorted({budget for curve in curves for budget in (*curve.uniform, *curve.score)})
    lines = [
        f"| task | plan | {' | '.join(f'{budget:g}' for budget in budgets)} |",
        "|---" * (len(budgets) + 2) + "|",
    ]
    for curve in curves:
        shares = {rank: curve.needed(rank) / rank for rank in curve.uniform}
        for name, values in (("uniform", curve.uniform), ("`score`", curve.score)):
            shown = [f"{values[b]:.3f}" if b in values else "" for b in budgets]
            lines.append(f"| {curve.task} | {name} | {' | '.join(shown)} |")
        shown = ["" if b not in shares else f"{shares[b]:.2f}" if shares[b] < 9 else "-" for b in budgets]
        lines.append(f"| {curve.task} | parameters of `score` / uniform's | {' | '.join(shown)} |")
    shares = {curve.task: curve.needed(curve.sufficient) / curve.sufficient for curve in curves}
    mean = sum(shares.values()) / len(shares)
    each = ", ".join(f"{c.task} {c.sufficient:g} ({shares[c.task]:.2f})" for c in curves)
    count = ", ".join(f"{curve.task} {curve.seeds}" for curve in curves)
    return "\n\n".join(
        [
            f"Test loss by budget, in uniform ranks; both restart. Seeds: {count}.",
            "\n".join(lines),
            f"Smallest sufficient uniform rank (parameters of `score` over its): {each}. Mean {mean:.2f}; the goal is "
            f"at most 1/3: {'met' if mean <= 1 / 3 else 'not met'}.",
        ]
    )
