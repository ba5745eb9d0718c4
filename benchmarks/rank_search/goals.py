"""The goals of the rank search, each with the number that was reached; `analyse.py` prints them."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

Value = tuple[float, float, float]


def show(value: Value, digits: int = 3) -> str:
    """Mean and interval."""
    return f"{value[0]:+.{digits}f} [{value[1]:+.{digits}f}, {value[2]:+.{digits}f}]"


def goals(
    table: list[dict],
    paired: Callable[[str], Value],
    agreements: dict[str, tuple[float, float]],
    cost: Path,
) -> list[tuple[str, str, bool | None]]:
    """(goal, number, met or not; None where it was not measured) at one budget.

    Args:
        table: `analyse.compare` of the budget.
        paired: another method -> `score` minus it, both restarting.
        agreements: method -> rank correlation of scores between seeds, and between tasks.
        cost: what `search_cost.py` wrote.
    """
    at = {(entry["method"], entry["start"]): entry for entry in table}
    rows: list[tuple[str, str, bool | None]] = []
    for start in ("restart", "inherit"):
        entry = at["score", start]
        percentile, below = entry["percentile"][0], float(np.mean(entry["below_random"]))
        who = start if entry["random_start"] == start else f"{start}; random plans {entry['random_start']}"
        rows += [
            (f"mean percentile within random <= 10 ({who})", f"{percentile:.0f}", percentile <= 10),
            (f"below the random mean in >= 90% of cells ({who})", f"{below:.0%}", below >= 0.9),
        ]
        mean, _, high = entry["vs_uniform"]
        worst = max(entry["vs_uniform_by_task"].values())
        met = mean <= -0.05 and high < 0 and worst <= 0.05
        number = f"{show(entry['vs_uniform'])}, worst task {worst:+.3f}"
        rows.append((f"- uniform <= -0.05, interval below 0, no task above +0.05 ({start})", number, met))
        low, high = entry["t_interval"]
        rows.append(
            (f"the same interval by t over the task means ({start})", f"[{low:+.3f}, {high:+.3f}]", high < 0)
        )
    for other in ("adalora", "eva"):
        if (other, "restart") in at:
            value = paired(other)
            rows.append((f"better than {other} on average", show(value), value[0] < 0))
    inverted = at["score-inverted", "restart"]["worse_than_all"][0]
    rows.append(("inverted scores worse than every random plan", f"{inverted:.0%} of cells", inverted == 1))
    if ("score-permuted", "restart") in at:
        value, lost = paired("score-permuted"), at["score-permuted", "restart"]["vs_random"]
        number = f"score - permuted {show(value)}; permuted - random {show(lost)}"
        rows.append(("label-permuted search data lose the gain", number, value[2] < 0 and lost[0] >= 0))
    for method in ("score", "darts"):
        if method in agreements:
            seeds, tasks = agreements[method]
            measured = seeds == seeds  # NaN where no task has two seeds yet
            number = f"{seeds:.2f} against {tasks:.2f}" if measured else "not run"
            rows.append(
                (
                    f"{method}: two seeds agree more than two tasks",
                    number,
                    seeds > tasks if measured else None,
                )
            )
    if ("darts", "restart") in at:
        for control in ("darts-inverted", "darts-permuted"):
            value = at[control, "restart"]["vs_random"]
            rows.append((f"the paper's mode, {control.partition('-')[2]}", f"- random {show(value)}", None))
        value = at["darts", "restart"]["vs_random"]
        rows.append(("the paper's mode better than random", show(value), value[2] < 0))
    if cost.exists():
        spent = json.loads(cost.read_text())
        number = f"{spent['share_of_time']:.0%} of {spent['finetune_steps']} steps"
        rows.append(
            ("search <= 15% of the time of a uniform-64 fine-tune", number, spent["share_of_time"] <= 0.15)
        )
    return rows


def markdown(rows: list[tuple[str, str, bool | None]]) -> str:
    """The goals as a Markdown table."""
    marks = {True: "yes", False: "no", None: ""}
    lines = [f"| {goal} | {number} | {marks[met]} |" for goal, number, met in rows]
    return "\n".join(["| goal | reached | met |", "|---|---|---|", *lines])
