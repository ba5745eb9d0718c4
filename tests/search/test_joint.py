"""One budget for several adapters: against all plans, and as it is typed."""

import itertools
import json

import numpy as np
import pytest

from lvnas.allocate import Budget, plan_ranks
from lvnas.costs import costs
from lvnas.errors import InputError
from lvnas.joint import allocate_jointly
from lvnas.strategies.base import Gains

RANKS = [0, 1, 2, 4]
SHAPES = {"a": (3, 4), "b": (8, 8), "c": (5, 6)}


def gains(seed, size=1.0, ranks=RANKS):
    values = size * np.random.default_rng(seed).random((len(SHAPES), len(ranks)))
    return Gains(shapes=SHAPES, ranks=ranks, values=values, errors=np.full_like(values, np.nan))


def total(found, plans, weights=None):
    return sum(
        (weights or {}).get(task, 1) * found[task].totals()[n, RANKS.index(rank)]
        for task, plan in plans.items()
        for n, rank in enumerate(plan.values())
    )


def parameters(plans):
    return sum(rank * sum(SHAPES[name]) for plan in plans.values() for name, rank in plan.items())


@pytest.mark.parametrize("weights", [None, {"first": 3.0}])
def test_best_of_all_pairs_of_plans(weights):
    found = {"first": gains(0), "second": gains(1)}
    budget = 101
    allowed = []
    for ranks in itertools.product(RANKS, repeat=6):
        plans = {
            "first": dict(zip(SHAPES, ranks[:3], strict=True)),
            "second": dict(zip(SHAPES, ranks[3:], strict=True)),
        }
        if 0.995 * budget <= parameters(plans) <= budget:
            allowed.append(plans)
    plans = allocate_jointly(found, Budget(params=budget), weights=weights)
    assert plans in allowed
    assert total(found, plans, weights) == pytest.approx(max(total(found, p, weights) for p in allowed))


def test_memory_goes_where_the_gains_are_and_never_less_is_gained_than_apart():
    found = {"small": gains(0, 0.1), "large": gains(1)}
    joint = allocate_jointly(found, Budget(like_uniform=1))
    apart = {task: plan_ranks(one, Budget(like_uniform=1)) for task, one in found.items()}
    assert parameters(joint) <= 2 * sum(map(sum, SHAPES.values()))
    assert total(found, joint) > total(found, apart)
    small, large = (parameters({task: plan}) for task, plan in joint.items())
    assert small < large
    turned = allocate_jointly(found, Budget(like_uniform=1), weights={"small": 100})
    assert parameters({"small": turned["small"]}) > small


def test_padded_adapters_share_their_highest_rank():
    """One engine: a slot of every adapter is as wide as the highest rank of all."""
    found = {"first": gains(0, ranks=[0, 1, 8]), "second": gains(1, ranks=[0, 1, 8])}
    plans = allocate_jointly(found, Budget(amount=2 * 8 * 34, by="pad"))
    highest = max(rank for plan in plans.values() for rank in plan.values())
    used = sum(sum(SHAPES[name]) for plan in plans.values() for name, rank in plan.items() if rank)
    assert highest == 8 and 0.995 * 2 * 8 * 34 <= 2 * highest * used <= 2 * 8 * 34


def test_bad_input():
    found = {"first": gains(0), "second": gains(1)}
    for weights, budget, message in (
        ({"third": 1}, Budget(params=60), "unknown task in weights 'third'; allowed: first, second"),
        ({"first": -1}, Budget(params=60), "weight -1 of first"),
        ({"first": float("inf")}, Budget(params=60), "weight inf of first is not a number >= 0"),
        ({}, Budget(like_uniform=1, by="group"), "jointly with --budget-by pad or ragged"),
        ({}, Budget(params=600), "reach 0 to 272"),
        ({}, Budget(), "needs a budget"),
    ):
        with pytest.raises(InputError, match=message):
            allocate_jointly(found, budget, weights=weights)
    with pytest.raises(InputError, match="of second are not those of the other tasks"):
        allocate_jointly({"first": gains(0), "second": gains(1, ranks=[0, 1])}, Budget(params=60))


TABLE = {"unit": "bytes", "shared": False, "costs": {"3x4": [1, 2]}}


@pytest.mark.parametrize(
    "change",
    [
        {"ranks": None},
        {"tables": None},
        {"tables": {"t": 5}},
        {"tables": {"t": TABLE | {"unit": ["bytes"]}}},
        {"tables": {"t": TABLE | {"costs": {"3x4": [1]}}}},
        {"tables": {"t": TABLE | {"costs": {"3x4": [1, "x"]}}}},
        {"tables": {"t": TABLE | {"costs": {"3x4": [1, float("nan")]}}}},
    ],
)
def test_a_broken_cost_table(tmp_path, change):
    whole = {"format": "lvnas-costs/1", "ranks": [1, 2], "tables": {"t": TABLE}}
    file = tmp_path / "costs.json"
    file.write_text(json.dumps(whole))
    assert costs("t", {"a": (3, 4)}, [0, 1, 2], file).values.tolist() == [[0, 1, 2]]
    file.write_text(json.dumps({key: value for key, value in (whole | change).items() if value is not None}))
    with pytest.raises(InputError, match=r"costs\.json is broken: .* make it again with `lvnas profile`"):
        costs("t", {"a": (3, 4)}, [0, 1, 2], file)


def test_as_it_is_typed(lvnas, raw_tiny, tmp_path):
    out = tmp_path / "joint"
    command = ("search", "codewords", "inverted", "--base", raw_tiny, "--method", "svd", "--steps", 2)
    command += ("--batch-size", 4, "--targets", "qk", "--ranks", "0,2,4", "--out", out)
    code, printed, errors = lvnas(*command, "--joint", "--like-uniform", 1, "--budget-by", "ragged", "--json")
    assert code == 0, errors
    summary = json.loads(printed)
    assert 0.995 * summary["budget"] <= summary["spent"] <= summary["budget"]
    assert 2 * sum(plan["parameters"] for plan in summary["tasks"].values()) == summary["spent"]
    for task in ("codewords", "inverted"):
        plan = json.loads((out / task / "ranks.json").read_text())
        assert plan["task"] == task and plan["provenance"]["joint"] == ["codewords", "inverted"]
    assert json.loads((out / "joint.json").read_text())["spent"] == summary["spent"]
    code, _, errors = lvnas(*command, "--joint", "--ratio", 4, "--weight", "codewords=x")
    assert code == 2 and "not of the form TASK=NUMBER" in errors
    code, _, errors = lvnas(*command, "--ratio", 4)
    assert code == 2 and "2 tasks: one at a time, or with --joint" in errors
