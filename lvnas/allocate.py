"""From gains to ranks: the plan of the largest total gain within a budget (a multiple-choice knapsack).

Legend: N modules, K ranks in the space, W budget in cost units.
"""

import math
from dataclasses import dataclass

import numpy as np

from lvnas.costs import Costs, parse_amount, parse_count
from lvnas.costs import costs as costs_of
from lvnas.errors import InputError
from lvnas.strategies.base import Gains

TOLERANCE = 0.005
"""A plan costs at most the budget and at least 1 - TOLERANCE of it."""
MOST_UNITS = 1 << 19
"""Finest resolution of costs; what rounding to it spends too much is taken off the budget, and tried again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """How much LoRA a plan may have; exactly one of params, ratio, like_uniform and amount is given."""

    params: str | int | None = None
    """LoRA parameters: 103255040, "103.3M"."""
    ratio: float | None = None
    """The highest rank everywhere, divided by this."""
    like_uniform: float | None = None
    """As much as this rank everywhere (fractions too)."""
    amount: str | float | None = None
    """In the unit of `by`: "12MB", "1.5ms"."""
    by: str = "params"
    """What is counted: a table of `lvnas.costs`."""
    table: str | None = None
    """File with the table, as `lvnas profile` writes it."""

    @property
    def given(self) -> list[str | float]:
        """Those of the four that are given."""
        four = (self.params, self.ratio, self.like_uniform, self.amount)
        return [value for value in four if value is not None]

    def costs(self, gains: Gains) -> Costs:
        """What the budget counts, over the modules and the space of `gains`."""
        return costs_of(self.by, gains.shapes, gains.ranks, self.table)

    def limit(self, costs: Costs) -> float:
        """The budget in the unit of `costs`.

        Raises:
            InputError: not exactly one of the four is given, or it is no positive number.
        """
        if len(self.given) != 1:
            raise InputError(
                f"{len(self.given)} budgets given; give exactly one of params, ratio, like_uniform, amount"
            )
        if self.params is not None:
            if self.by != "params":
                raise InputError(f"params counts parameters, not {self.by}; give the amount as budget")
            limit = parse_count(self.params)
        elif self.amount is not None:
            limit = parse_amount(self.amount, costs.unit)
        elif self.ratio is not None:
            limit = costs.uniform(costs.ranks[-1]) / self.ratio if self.ratio > 0 else math.nan
        else:
            limit = costs.uniform(float(self.like_uniform or 0))
        if not limit > 0 or math.isinf(limit):
            raise InputError(f"budget {self.given[0]} is not a positive number")
        return limit


class OutOfReach(InputError):
    """No plan of the space costs that much."""


def plan_ranks(gains: Gains, budget: Budget, *, max_rank: int | None = None) -> dict[str, int]:
    """The rank of every module, `allocate`d within `budget`; without one, for strategies that choose alone.

    Raises:
        InputError: see `allocate` and `Budget`.
    """
    costs = budget.costs(gains)
    limit = budget.limit(costs) if budget.given else None
    return allocate(gains, limit, costs=costs.values, shared=costs.shared, max_rank=max_rank)


def allocate(
    gains: Gains,
    budget: float | None,
    *,
    costs: np.ndarray | None = None,
    shared: bool = False,
    max_rank: int | None = None,
) -> dict[str, int]:
    """The rank of every module: the largest total gain that costs at most `budget`, within TOLERANCE of it.

    Args:
        gains: from a strategy.
        budget: in the unit of `costs`. None takes each module's best rank, for strategies that choose so.
        costs: [N, K], not decreasing along K; LoRA parameters if None.
        shared: all modules of rank > 0 cost what the plan's highest rank costs (`Costs.shared`).
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
            raise InputError("this method needs a budget; give one of params, ratio, like_uniform, amount")
        picks = totals.argmax(axis=1)
    elif shared:
        picks = _shared_knapsack(totals, costs, budget, nothing=gains.ranks[0] == 0)
    else:
        picks = _knapsack(totals, costs, budget)
    return {name: gains.ranks[kept[k]] for name, k in zip(gains.shapes, picks, strict=True)}


def _shared_knapsack(totals: np.ndarray, costs: np.ndarray, budget: float, *, nothing: bool) -> np.ndarray:
    """The best of the plans under each highest rank; `nothing`: choice 0 is rank 0, which costs nothing."""
    best: tuple[float, np.ndarray] | None = None
    ranges = []
    for cap in range(int(nothing), costs.shape[1]):
        under = np.repeat(costs[:, cap : cap + 1], cap + 1, axis=1)
        if nothing:
            under[:, 0] = costs[:, 0]
        ranges.append(f"{_shown(under.min(axis=1).sum())} to {_shown(under.max(axis=1).sum())}")
        try:
            picks = _knapsack(totals[:, : cap + 1], under, budget)
        except OutOfReach:
            continue
        total = totals[np.arange(len(picks)), picks].sum()
        if best is None or total > best[0]:
            best = total, picks
    if best is None:
        raise OutOfReach(
            f"budget {_shown(budget)} cannot be reached; with each of the space's ranks as the highest, "
            f"plans reach {', '.join(ranges)}"
        )
    return best[1]


def _knapsack(totals: np.ndarray, costs: np.ndarray, budget: float) -> np.ndarray:
    """The choice per module [N] of the largest total gain that costs at most `budget`."""
    lowest, highest = costs.min(axis=1).sum(), costs.max(axis=1).sum()
    if not (lowest <= budget and budget * (1 - TOLERANCE) <= highest):
        raise OutOfReach(
            f"budget {_shown(budget)} cannot be reached; "
            f"this space and these targets reach {_shown(lowest)} to {_shown(highest)}"
        )
    limit = min(budget, highest)
    unit = _unit(costs - costs.min(axis=1, keepdims=True), limit - lowest)
    while True:
        picks = _solve(totals, costs, limit, budget, unit)
        excess = costs[np.arange(len(picks)), picks].sum() - budget
        if excess <= 1e-12 * budget:
            return picks
        limit -= excess + unit


def _solve(totals: np.ndarray, costs: np.ndarray, limit: float, budget: float, unit: float) -> np.ndarray:
    """Exact dynamic programming over the cost above the cheapest plan, in whole units up to `limit`."""
    floor = costs.min(axis=1, keepdims=True)
    lowest = floor.sum()
    steps = np.rint((costs - floor) / unit).astype(np.int64)
    room = int((limit - lowest) / unit + 1e-9)
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
        raise OutOfReach(
            f"no plan costs within {TOLERANCE:.1%} under the budget {_shown(budget)}; "
            f"the nearest below is {_shown(nearest)}"
        )
    return start + int(window.argmax())


def _trace(best: np.ndarray, taken: np.ndarray, steps: np.ndarray, end: int) -> np.ndarray:
    picks = np.zeros(len(taken), dtype=np.int64)
    for n in range(len(taken) - 1, -1, -1):
        picks[n] = taken[n, end]
        end -= steps[n, picks[n]]
    assert end == 0, "the trace must end at the cheapest plan"
    return picks


def _shown(cost: float) -> str:
    """Whole parameters and bytes; seconds in four digits."""
    return f"{cost:,.0f}" if cost >= 100 or cost == int(cost) else f"{cost:.4g}"
