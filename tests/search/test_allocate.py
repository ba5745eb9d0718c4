"""The allocator against brute force, and what it says to budgets that cannot be."""

import itertools

import numpy as np
import pytest

from lvnas.allocate import Budget, allocate, parse_count
from lvnas.errors import InputError
from lvnas.strategies.base import Gains

RANKS = [0, 1, 2, 4, 8]


def random_gains(seed, shapes, ranks=RANKS, **more):
    values = np.random.default_rng(seed).normal(size=(len(shapes), len(ranks)))
    shapes = {f"m{i}": shape for i, shape in enumerate(shapes)}
    return Gains(shapes=shapes, ranks=ranks, values=values, errors=np.zeros_like(values), **more)


def total(gains, plan):
    rows = gains.totals()
    return sum(rows[n, gains.ranks.index(rank)] for n, rank in enumerate(plan.values()))


def cost(gains, plan):
    return sum(rank * sum(gains.shapes[name]) for name, rank in plan.items())


@pytest.mark.parametrize("seed", range(20))
def test_best_of_all_plans(seed):
    gains = random_gains(seed, [(3, 4), (8, 8), (5, 5), (1, 2), (16, 4)])
    budget = np.random.default_rng(seed).integers(60, 350)
    plans = [dict(zip(gains.shapes, ranks, strict=True)) for ranks in itertools.product(RANKS, repeat=5)]
    allowed = [plan for plan in plans if 0.995 * budget <= cost(gains, plan) <= budget]
    if not allowed:
        with pytest.raises(InputError, match="nearest below"):
            allocate(gains, budget)
        return
    plan = allocate(gains, budget)
    assert plan in allowed
    assert total(gains, plan) == pytest.approx(max(total(gains, other) for other in allowed))


def test_real_costs_stay_within_the_budget():
    gains = random_gains(0, [(7, 9)] * 40)
    costs = np.sort(np.random.default_rng(1).random((40, 5)), axis=1)
    for budget in (12.0, 20.0, 30.5):
        plan = allocate(gains, budget, costs=costs)
        spent = sum(costs[n, RANKS.index(rank)] for n, rank in enumerate(plan.values()))
        assert 0.995 * budget <= spent <= budget


def test_like_uniform_is_hit_exactly_by_the_uniform_plan():
    gains = random_gains(0, [(3, 4), (8, 8), (5, 5)])
    for rank in RANKS[1:]:
        plan = allocate(gains, Budget(like_uniform=rank).parameters(gains))
        assert cost(gains, plan) <= rank * 33
        assert cost(gains, plan) >= 0.995 * rank * 33


def test_the_size_of_the_published_adapters():
    text, kv, wide, vision, vision_wide = 4096, 1024, 14336, 1280, 5120
    shapes = [
        (text, text),
        (text, kv),
        (text, kv),
        (text, text),
        (text, wide),
        (text, wide),
        (wide, text),
    ] * 40
    shapes += [(vision, vision)] * 160 + [(vision, vision_wide), (vision_wide, vision)] * 40
    gains = random_gains(0, shapes, [4, 8, 16, 32, 64])
    assert len(shapes) == 520
    budget = Budget(ratio=268_697_600 / 103_255_040).parameters(gains)
    assert budget == pytest.approx(103_255_040)
    assert 0.995 * budget <= cost(gains, allocate(gains, budget)) <= budget


def test_highest_rank():
    gains = random_gains(0, [(3, 4), (8, 8), (5, 5)])
    assert max(allocate(gains, 66, max_rank=2).values()) == 2


def test_without_a_budget_only_a_choosing_method():
    shapes = [(3, 4), (8, 8)]
    with pytest.raises(InputError, match="needs a budget"):
        allocate(random_gains(0, shapes), None)
    gains = random_gains(0, shapes, chooses=True)
    picks = gains.totals().argmax(axis=1)
    assert list(allocate(gains, None).values()) == [RANKS[k] for k in picks]


def test_budgets():
    gains = random_gains(0, [(3, 4), (8, 8)], [4, 8, 16])
    assert parse_count("103.3M") == 103.3e6
    assert parse_count("1_000k") == 1e6
    assert Budget(ratio=2).parameters(gains) == 16 * 23 / 2
    assert Budget(like_uniform=0.5).parameters(gains) == 11.5
    for text in ("lots", "-3", "1.2X", ""):
        with pytest.raises(InputError, match="not a number of parameters"):
            parse_count(text)
    for bad in (Budget(), Budget(params=3, ratio=2)):
        with pytest.raises(InputError, match="exactly one"):
            bad.parameters(gains)
    for bad in (Budget(params=0), Budget(ratio=-1), Budget(ratio=0), Budget(like_uniform=float("nan"))):
        with pytest.raises(InputError, match="not a positive number"):
            bad.parameters(gains)
    for budget in (80, 400):
        with pytest.raises(InputError, match="reach 92 to 368"):
            allocate(gains, budget)
    with pytest.raises(InputError, match="leaves no rank"):
        allocate(gains, 92, max_rank=3)
