"""The allocator against brute force, and what it says to budgets that cannot be."""

import dataclasses
import itertools

import numpy as np
import pytest

from lvnas.allocate import Budget, allocate, plan_ranks
from lvnas.costs import Costs, costs, parse_amount, parse_count, shape_name, write_table
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


def limit(budget, gains):
    return budget.limit(budget.costs(gains))


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


def test_the_lowest_uniform_rank_is_within_its_own_cost():
    """Seconds added up in another order than the allocator's may be a rounding error less."""
    space = [4, 8, 16, 32, 64]
    gains = dataclasses.replace(random_gains(0, [(7, 9)] * 59), ranks=space)
    for seed in range(50):
        values = np.sort(np.random.default_rng(seed).random((59, len(space))), axis=1)
        table = Costs(unit="seconds", ranks=space, values=values)
        plan = allocate(gains, table.uniform(4), costs=values)
        assert set(plan.values()) == {4}


def test_rounding_to_units_does_not_add_up(monkeypatch):
    """With 200 modules and 8192 units, half a unit each is 1.2% of the budget."""
    monkeypatch.setattr("lvnas.allocate.MOST_UNITS", 1 << 13)
    for seed in range(5):
        gains = random_gains(seed, [(7, 9)] * 200, [0, 4])
        costs = np.sort(np.random.default_rng(seed).random((200, 2)), axis=1)
        budget = costs.mean(axis=1).sum()
        plan = allocate(gains, budget, costs=costs)
        spent = sum(costs[n, [0, 4].index(rank)] for n, rank in enumerate(plan.values()))
        assert 0.995 * budget <= spent <= budget


def test_like_uniform_is_hit_exactly_by_the_uniform_plan():
    gains = random_gains(0, [(3, 4), (8, 8), (5, 5)])
    for rank in RANKS[1:]:
        plan = allocate(gains, limit(Budget(like_uniform=rank), gains))
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
    budget = limit(Budget(ratio=268_697_600 / 103_255_040), gains)
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
    assert limit(Budget(ratio=2), gains) == 16 * 23 / 2
    assert limit(Budget(like_uniform=0.5), gains) == 11.5
    for text in ("lots", "-3", "1.2X", ""):
        with pytest.raises(InputError, match="not a number of parameters"):
            parse_count(text)
    for bad in (Budget(), Budget(params=3, ratio=2)):
        with pytest.raises(InputError, match="exactly one"):
            limit(bad, gains)
    for bad in (Budget(params=0), Budget(ratio=-1), Budget(ratio=0), Budget(like_uniform=float("nan"))):
        with pytest.raises(InputError, match="not a positive number"):
            limit(bad, gains)
    for budget in (80, 400):
        with pytest.raises(InputError, match="reach 92 to 368"):
            allocate(gains, budget)
    with pytest.raises(InputError, match="leaves no rank"):
        allocate(gains, 92, max_rank=3)


@pytest.mark.parametrize("seed", range(10))
def test_a_shared_rank_is_the_best_of_all_plans(seed):
    """Layouts `pad` and `group`: a slot holds all modules of an adapter at the adapter's highest rank."""
    gains = random_gains(seed, [(3, 4), (8, 8), (5, 5), (1, 2), (16, 4)])
    table = costs("pad", gains.shapes, gains.ranks)
    width = np.array([sum(shape) for shape in gains.shapes.values()])

    def slot_bytes(ranks):
        highest = max(ranks)
        return 2 * (8 if highest > 1 else highest) * width[np.array(ranks) > 0].sum()  # vLLM has 1 and 8

    plans = {ranks: slot_bytes(ranks) for ranks in itertools.product(RANKS, repeat=5)}
    budget = 1.001 * sorted(plans.values())[len(plans) // 2]
    allowed = [ranks for ranks, cost in plans.items() if 0.995 * budget <= cost <= budget]
    plan = plan_ranks(gains, Budget(amount=budget, by="pad"))
    assert tuple(plan.values()) in allowed
    assert table.spent(plan) == plans[tuple(plan.values())]
    best = max(total(gains, dict(zip(gains.shapes, ranks, strict=True))) for ranks in allowed)
    assert total(gains, plan) == pytest.approx(best)


def test_slot_bytes_are_those_that_inspect_plans(tmp_path):
    from lvnas import inspect

    gains = random_gains(0, [(64, 96)] * 8)
    plan = plan_ranks(gains, Budget(like_uniform=2, by="ragged"))
    modules = {name: (*gains.shapes[name], rank) for name, rank in plan.items() if rank}
    shape = inspect.Shape(name="a", base=None, item_bytes=2, modules=modules)
    planned = {row["layout"]: row["device_bytes"] for row in inspect.plan([shape], 1, 1)}
    assert planned == {
        by: costs(by, gains.shapes, gains.ranks).spent(plan) for by in ("pad", "group", "ragged")
    }
    assert 0.995 * 2 * 8 * 160 * 2 <= planned["ragged"] <= 2 * 8 * 160 * 2


def test_measured_costs(tmp_path):
    gains = random_gains(0, [(64, 96)] * 30 + [(96, 64)] * 30)
    file = tmp_path / "costs.json"
    seconds = {"64x96": [1.01e-5, 1.53e-5, 3e-5, 2.9e-5], "96x64": [2e-5, 2.57e-5, 4e-5, 6e-5]}
    latency = {"unit": "seconds", "shared": False, "costs": seconds}
    write_table(file, RANKS[1:], {"latency": latency})
    table = costs("latency", gains.shapes, gains.ranks, file)
    assert table.values[0].tolist() == [0, 1.01e-5, 1.53e-5, 3e-5, 3e-5]  # a higher rank is never cheaper
    for amount in ("1ms", "900us", 0.0012):
        plan = plan_ranks(gains, Budget(amount=amount, by="latency", table=str(file)))
        budget = parse_amount(amount, "seconds")
        assert 0.995 * budget <= table.spent(plan) <= budget * (1 + 1e-9)
    for bad, message in (
        (Budget(amount="1ms", by="latency"), "must be measured.*lvnas profile"),
        (Budget(amount="1ms", by="bytes"), "unknown cost 'bytes'; allowed: params, ragged"),
        (Budget(amount="1ms", by="watts", table=str(file)), "has no table 'watts'; it has latency"),
        (Budget(amount="1h", by="latency", table=str(file)), "'1h' is not a time"),
        (
            Budget(amount="1s", by="latency", table=str(file)),
            r"budget 1 cannot be reached; .* reach 0 to 0\.0027",
        ),
        (Budget(params="1M", by="ragged"), "params counts parameters, not ragged"),
        (Budget(amount="1M", by="params", table=str(tmp_path)), "not a JSON file"),
    ):
        with pytest.raises(InputError, match=message):
            plan_ranks(gains, bad)
    with pytest.raises(InputError, match=r"no costs of rank 3, only of 1, 2, 4, 8; .*--ranks 3,4"):
        costs("latency", gains.shapes, [3, 4], file)
    with pytest.raises(InputError, match=rf"no costs of {shape_name((5, 6))} \(m\), only of 64x96"):
        costs("latency", {"m": (5, 6)}, [1], file)


def test_budgets_out_of_a_shared_rank_s_reach_name_what_each_rank_reaches():
    gains = random_gains(0, [(3, 4), (8, 8)], [4, 8, 16])
    with pytest.raises(InputError, match=r"rank.* as the highest, plans reach 368 to 368, 368 to 368, 736"):
        plan_ranks(gains, Budget(amount=500, by="pad"))
    assert set(plan_ranks(gains, Budget(amount="736", by="pad")).values()) <= {4, 8, 16}
