"""`lvnas search`."""

import json
from pathlib import Path
from typing import Any

import click

METHODS = "score (ours), darts (the paper), or a baseline: svd, eva, adalora, type, uniform, random."

BY = (
    "What budgets count: params; bytes of a serving slot in the layout ragged, pad or group; "
    "or latency, measured by `lvnas profile`."
)

SCALING = "Of lower ranks: constant, alpha (alpha / r) or rslora (alpha / sqrt r), for derive."
REPEATS = "Searches with this many seeds; their mean gains decide, their spread gives standard errors."
WEIGHT = "With --joint: what a task's gains count, such as its share of the traffic; 1 by default."


@click.command()
@click.argument("tasks", nargs=-1, required=True, metavar="TASK...")
@click.option("--joint", is_flag=True, help="One budget for the adapters of all TASKs; OUT/TASK/ranks.json.")
@click.option("--weight", "weights", multiple=True, metavar="TASK=NUMBER", help=WEIGHT)
@click.option("--base", default="tiny", show_default=True, help="Short name, Hub id or folder.")
@click.option("--method", default="score", show_default=True, help=METHODS)
@click.option("--targets", default="all", show_default=True, help="Groups or module names, comma-separated.")
@click.option("--ranks", default="4,8,16,32,64", show_default=True, help="The space; 0 is allowed.")
@click.option("--params", help="Budget: LoRA parameters, such as 103.3M.")
@click.option("--ratio", type=float, help="Budget: the highest rank everywhere, divided by this.")
@click.option("--like-uniform", type=float, help="Budget: as much as this rank everywhere.")
@click.option("--budget", "amount", help="Budget in the unit of --budget-by: 103.3M, 12MB, 1.5ms.")
@click.option("--budget-by", "by", default="params", show_default=True, help=BY)
@click.option("--costs", "table", help="File of `lvnas profile`, with the table of --budget-by.")
@click.option("--max-rank", type=int, help="Highest rank that the plan may have.")
@click.option("--steps", type=click.IntRange(1), default=60, show_default=True, help="Training steps.")
@click.option(
    "--batch-size", type=click.IntRange(1), default=16, show_default=True, help="Examples per step."
)
@click.option("--learning-rate", type=float, default=1e-3, show_default=True, help="AdamW's, for A and B.")
@click.option("--scale", type=float, default=1.0, show_default=True, help="LoRA scaling of the highest rank.")
@click.option("--scaling", default="constant", show_default=True, help=SCALING)
@click.option("--seed", default=0, show_default=True, help="Of LoRA's start and of the data's order.")
@click.option("--repeats", default=1, show_default=True, help=REPEATS)
@click.option("--option", "options", multiple=True, metavar="NAME=VALUE", help="An option of the method.")
@click.option("--dtype", default="auto", show_default=True, help="Of the base's weights.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder; resumed if interrupted.")
@click.option("--json", "as_json", is_flag=True, help="Print a summary as JSON.")
def command(
    tasks: tuple[str, ...],
    joint: bool,
    weights: tuple[str, ...],
    base: str,
    method: str,
    targets: str,
    ranks: str,
    params: str | None,
    ratio: float | None,
    like_uniform: float | None,
    amount: str | None,
    by: str,
    table: str | None,
    max_rank: int | None,
    scaling: str,
    repeats: int,
    dtype: str,
    out: Path,
    as_json: bool,
    options: tuple[str, ...],
    **settings: Any,
) -> None:
    """Find a LoRA rank for every module of BASE on TASK, within a budget; writes OUT/ranks.json.

    A finished search is not repeated: with the same settings and another budget it only allocates again.
    Under torchrun (-m lvnas search ...) the processes share every batch.
    """
    from lvnas.allocate import Budget
    from lvnas.distributed import is_first
    from lvnas.errors import InputError
    from lvnas.joint import parse_weights, search_jointly
    from lvnas.strategies import SearchConfig
    from lvnas.task_search import parse_options, parse_ranks, search_task

    config = SearchConfig(
        method=method, targets=targets, ranks=parse_ranks(ranks), options=parse_options(options), **settings
    )
    budget = Budget(params=params, ratio=ratio, like_uniform=like_uniform, amount=amount, by=by, table=table)
    common: dict[str, Any] = {"budget": budget, "max_rank": max_rank, "scaling": scaling}
    common |= {"repeats": repeats, "dtype": dtype}
    if joint:
        summary = search_jointly(tasks, base, config, out, weights=parse_weights(weights), **common)
    elif len(tasks) == 1 and not weights:
        summary = search_task(tasks[0], base, config, out, **common)
    else:
        raise InputError(
            f"{len(tasks)} tasks: one at a time, or with --joint under one budget (and --weight)"
        )
    if not is_first():
        return
    if as_json:
        print(json.dumps(summary, indent=1))
        return
    for plan in summary["tasks"].values() if joint else [summary]:
        print(f"{plan['ranks']}: {plan['parameters']:,} LoRA parameters in {plan['modules']} modules")
        print("ranks: " + ", ".join(f"{rank} x {count}" for rank, count in plan["histogram"].items()))
    if summary["budget"] is not None:
        print(f"{summary['by']}: {summary['spent']:,.6g} of {summary['budget']:,.6g}")
