"""`lvnas search TASK... --joint`: one budget for all adapters of a set, spent where it helps most.

The modules of all tasks go into one knapsack, so that a task whose gains are small gives its memory to the others.
Gains of different tasks must be in one unit for that: those of one method, searched with the same settings.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lvnas import bases, distributed, files
from lvnas.allocate import Budget, plan_ranks
from lvnas.errors import InputError, unknown
from lvnas.ranks import check_scaling
from lvnas.strategies import Gains, SearchConfig
from lvnas.task_search import no_gains, search_tasks, write_plan

FORMAT = "lvnas-joint/1"
SUMMARY = "joint.json"
BETWEEN = "\n"
"""Between a task's and a module's name in the common knapsack; neither can contain it."""


def allocate_jointly(
    gains: Mapping[str, Gains],
    budget: Budget,
    *,
    weights: Mapping[str, float] | None = None,
    max_rank: int | None = None,
) -> dict[str, dict[str, int]]:
    """The ranks of every task's adapter: the largest weighted total gain within one budget for all of them.

    Args:
        gains: by task, of one method over one space.
        budget: for the whole set; `ratio` and `like_uniform` count every adapter. With `by="pad"` all adapters
            share their highest rank, as they do in one engine.
        weights: what a task's gains count, such as its share of the traffic; 1 where none is given.

    Raises:
        InputError: spaces that differ, a weight of an unknown task or not in [0, inf), the layout `group`, or a budget
        out of reach.
    """
    weights = dict(weights or {})
    for task, weight in weights.items():
        if task not in gains:
            raise unknown("task in weights", task, gains)
        if not 0 <= weight < math.inf:
            raise InputError(f"weight {weight} of {task} is not a number >= 0")
    if budget.by == "group":
        raise InputError(
            "group keeps adapters of other highest ranks in other engines, with a budget each; "
            "search those tasks apart, or jointly with --budget-by pad or ragged"
        )
    ranks = plan_ranks(_joined(gains, weights), budget, max_rank=max_rank)
    plans: dict[str, dict[str, int]] = {task: {} for task in gains}
    for key, rank in ranks.items():
        task, _, name = key.partition(BETWEEN)
        plans[task][name] = rank
    return plans


def search_jointly(
    tasks: Sequence[str],
    base: str,
    config: SearchConfig,
    out: Path,
    *,
    budget: Budget,
    weights: Mapping[str, float] | None = None,
    max_rank: int | None = None,
    scaling: str = "constant",
    repeats: int = 1,
    dtype: str = "auto",
) -> dict[str, Any]:
    """Searches every task in a folder of its own in `out`, and writes a ranks.json there for the common budget.

    Returns:
        What was counted, the budget, what is spent of it, and every task's plan in numbers (`write_plan`); also
        in `out`/joint.json.

    Raises:
        InputError: see `allocate_jointly` and `lvnas.task_search.search_task`; or two tasks of one name.
    """
    check_scaling(scaling)
    folders = {task: Path(out) / Path(task).stem for task in tasks}
    if len(set(folders.values())) < len(tasks):
        raise InputError(f"tasks {', '.join(tasks)}: each needs a name of its own")
    nothing = no_gains(bases.meta_model(base), config)
    allocate_jointly(
        dict.fromkeys(tasks, nothing), budget, weights=weights, max_rank=max_rank
    )  # refuses early
    gains = search_tasks(folders, base, config, repeats=repeats, dtype=dtype)
    plans = allocate_jointly(gains, budget, weights=weights, max_rank=max_rank)
    joined = _joined(gains, {})
    costs = budget.costs(joined)
    facts: dict[str, Any] = {
        "budget": dataclasses.asdict(budget),
        "repeats": repeats,
        "joint": list(tasks),
        "weights": dict(weights or {}),
    }
    summary = {
        "by": budget.by,
        "budget": budget.limit(costs) if budget.given else None,
        "spent": costs.spent(_keyed(plans)),
        "tasks": {
            task: write_plan(folders[task], task, base, config, gains[task], plan, scaling, **facts)
            for task, plan in plans.items()
        },
    }
    if distributed.is_first():
        made = files.provenance(**facts)
        files.write_json(Path(out) / SUMMARY, {"format": FORMAT, **summary, "provenance": made})
    return summary


def parse_weights(given: Sequence[str]) -> dict[str, float]:
    """`["codewords=2"]` -> {"codewords": 2.0}.

    Raises:
        InputError: not of that form.
    """
    try:
        return {task: float(weight) for task, _, weight in (text.rpartition("=") for text in given)}
    except ValueError:
        raise InputError(f"weights {', '.join(given)} are not of the form TASK=NUMBER") from None


def _joined(gains: Mapping[str, Gains], weights: Mapping[str, float]) -> Gains:
    """One set of gains over the modules of all tasks."""
    spaces = {task: one.ranks for task, one in gains.items()}
    first = next(iter(spaces.values()))
    for task, space in spaces.items():
        if space != first:
            raise InputError(f"the ranks {space} of {task} are not those of the other tasks, {first}")
    return Gains(
        shapes=_keyed({task: one.shapes for task, one in gains.items()}),
        ranks=first,
        values=np.concatenate([weights.get(task, 1.0) * one.values for task, one in gains.items()]),
        errors=np.concatenate([weights.get(task, 1.0) * one.errors for task, one in gains.items()]),
        chooses=all(one.chooses for one in gains.values()),
    )


def _keyed(by_task: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {
        f"{task}{BETWEEN}{name}": value for task, values in by_task.items() for name, value in values.items()
    }
