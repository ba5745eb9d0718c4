"""From gains to ranks: the plan of the largest total gain within a budget (a multiple-choice knapsack).

Legend: N modules, K ranks in the space, W budget in cost units.
"""

import math
import re
from dataclasses import dataclass

import numpy as np

from lvnas.errors import InputError
from lvnas.strategies.base import Gains

TOLERANCE = 0.005
"""A plan costs at most the budget and at least 1 - TOLERANCE of it."""
MOST_UNITS = 1 << 19
"""Finest resolution of costs; coarser units round costs up, so that a budget is never exceeded."""
_SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9}


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """How much LoRA a plan may have; exactly one of the three is given."""

    params: str | int | None = None
    """LoRA parameters: 103255040, "103.3M"."""
    ratio: float | None = None
    """The highest rank everywhere, divided by this."""
    like_uniform: float | None = None
    """As many parameters as this rank everywhere (fractions too)."""

    def parameters(self, gains: Gains) -> float:
        """The budget in parameters.

        Raises:
            InputError: not exactly one of them is given, or it is no positive number.
        """
        given = [value for value in (self.params, self.ratio, self.like_uniform) if value is not None]
        if len(given) != 1:
            raise InputError(f"{len(given)} budgets given; give exactly one of params, ratio, like_uniform")
        per_rank = sum(sum(shape) for shape in gains.shapes.values())
        if self.params is not None:
            budget = parse_count(self.params)
        elif self.ratio is not None:
            budget = max(gains.ranks) * per_rank / self.ratio if self.ratio > 0 else math.nan
        else:
            budget = per_rank * float(self.like_uniform or 0)
        if not budget > 0 or math.isinf(budget):
            raise InputError(f"budget {given[0]} is not a positive number")
        return budget


def parse_count(text: str | int) -> float:
    """`"103.3M"` -> 103300000.0; suffixes K, M, G or B in either case.

    Raises:
        InputError: not a number with such a suffix.
    """
    match = re.fullmatch(r"\s*([0-9_]*\.?[0-9]+(?:e[0-9]+)?)\s*([kmgb]?)\s*", str(text).lower())
    if not match:
        raise InputError(f"budget {text!r} is not a number of parameters; write 103255040, 103.3M or 1.2G")
    return float(match[1]) * _SUFFIXES[match[2]]


def allocate(
    gains: Gains, budget: float | None, *, costs: np.ndarray | None = None, max_rank: int | None = None
) -> dict[str, int]:
    """The rank of every module: the largest total gain that costs at most `budget`, within TOLERANCE of it.

    Args:
        gains: from a strategy.
        budget: in the unit of `costs`. None takes each module's best rank, for strategies that choose so.
        costs: [N, K], not decreasing along K; LoRA parameters if None.
        max_rank: leave out higher ranks.

    Raises:
        InputError: no budget for a strategy that needs one, or one that no plan reaches: the range it gives.
    """
    kept = [k for k, rank in enumerate(gains.ranks) if max_rank is None or rank <= max_rank]
    if not kept:
        raise InputError(f"highest rank {max_rank} leaves no rank of the space {gains.ranks}")
    totals = gains.totals()[:, kept]
    costs = (gains.parameters() if costs is None else np.asarray(costs))[:, kept]
    if budget is None:
        if not gains.chooses:
            raise InputError("this method needs a budget; give one of params, ratio, like_uniform")
        picks = totals.argmax(axis=1)
    else:
        picks = _knapsack(totals, costs, budget)
    return {name: gains.ranks[kept[k]] for name, k in zip(gains.shapes, picks, strict=True)}


def _knapsack(totals: np.ndarray, costs: np.ndarray, budget: float) -> np.ndarray:
    """The choice per module [N] by exact dynamic programming over the cost above the cheapest plan."""
    floor = costs.min(axis=1, keepdims=True)
    lowest, highest = floor.sum(), costs.max(axis=1).sum()
    if not (lowest <= budget and budget * (1 - TOLERANCE) <= highest):
        raise InputError(
            f"budget {budget:,.0f} cannot be reached; "
            f"this space and these targets reach {lowest:,.0f} to {highest:,.0f}"
        )
    unit = _unit(costs - floor, budget - lowest)
    steps = np.ceil((costs - floor) / unit - 1e-9).astype(np.int64)
    room = int((min(budget, highest) - lowest) / unit + 1e-9)
    best = np.full(room + 1, -np.inf)
    best[0] = 0.0
    taken = np.zeros((len(totals), room + 1), dtype=np.uint8)
    for n, (gain, cost) in enumerate(zip(totals, steps, strict=True)):
        reached = np.full(room + 1, -np.inf)
        for k in range(len(gain)):
            if cost[k] > room:
                continue
            candidate = best[: room + 1 - cost[k]] + gain[k]
            better = candidate > reached[cost[k] :]
            reached[cost[k] :][better] = candidate[better]
            taken[n, cost[k] :][better] = k
        best = reached
    return _trace(best, taken, steps, _window(best, budget, lowest, unit))


def _unit(extra: np.ndarray, room: float) -> float:
    """The cost unit: the greatest common divisor of whole-number costs where that is not too fine."""
    coarse = max(room, 1e-12) / MOST_UNITS
    if np.issubdtype(extra.dtype, np.integer):
        return max(float(np.gcd.reduce(extra, axis=None)) or 1.0, coarse)
    return coarse


def _window(best: np.ndarray, budget: float, lowest: float, unit: float) -> int:
    """Index of the best total among the costs within TOLERANCE under the budget."""
    start = max(0, math.ceil((budget * (1 - TOLERANCE) - lowest) / unit - 1e-9))
    window = best[start:]
    if not np.isfinite(window).any():
        reachable = np.flatnonzero(np.isfinite(best))
        nearest = lowest + unit * reachable[-1]
        raise InputError(
            f"no plan costs within {TOLERANCE:.1%} under the budget {budget:,.0f}; "
            f"the nearest below is {nearest:,.0f}"
        )
    return start + int(window.argmax())


def _trace(best: np.ndarray, taken: np.ndarray, steps: np.ndarray, end: int) -> np.ndarray:
    picks = np.zeros(len(taken), dtype=np.int64)
    for n in range(len(taken) - 1, -1, -1):
        picks[n] = taken[n, end]
        end -= steps[n, picks[n]]
    assert end == 0, "the trace must end at the cheapest plan"
    return picks
