"""`lvnas search`: searches a base on tasks, and allocates a budget with what it found: `ranks.json`."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lvnas import bases, distributed, files
from lvnas.adapter_config import MAX_RANK
from lvnas.allocate import Budget, plan_ranks
from lvnas.errors import InputError, check_above_zero, check_counts, check_seed
from lvnas.modules import find_targets
from lvnas.ranks import RankPlan, check_scaling
from lvnas.repeats import run_repeats, seeds_of
from lvnas.search import MEAN, SCORES, Shuffled, keep_mean, run
from lvnas.strategies import CHOOSING, Gains, SearchConfig, check_method
from lvnas.supernet import check_space

RANKS = "ranks.json"


def search_task(
    task: str,
    base: str,
    config: SearchConfig,
    out: Path,
    *,
    budget: Budget,
    max_rank: int | None = None,
    scaling: str = "constant",
    repeats: int = 1,
    dtype: str = "auto",
) -> dict[str, Any]:
    """Searches `base` on the task's train and search splits and writes `out`/ranks.json for `budget`.

    Returns:
        The plan in numbers: see `write_plan`.

    Raises:
        InputError: an unknown base, task or method, settings that do not fit, or a budget out of reach.
    """
    out = Path(out)
    check_scaling(scaling)
    nothing = no_gains(bases.meta_model(base), config)
    plan_ranks(nothing, budget, max_rank=max_rank)  # refuses now what it would refuse after the search
    gains = search_tasks({task: out}, base, config, repeats=repeats, dtype=dtype)[task]
    ranks = plan_ranks(gains, budget, max_rank=max_rank)
    costs = budget.costs(gains)
    spent = {"by": budget.by, "budget": budget.limit(costs) if budget.given else None}
    spent |= {"spent": costs.spent(ranks)}
    facts = {"budget": dataclasses.asdict(budget), "repeats": repeats}
    return write_plan(out, task, base, config, gains, ranks, scaling, **facts) | spent


def no_gains(model: nn.Module, config: SearchConfig) -> Gains:
    """Gains of 0 for `model`: with them an allocation fails where it would fail after the search.

    Raises:
        InputError: an unknown method or option, or a space or targets that do not fit.
    """
    check_method(config)
    check_counts(steps=config.steps, batch_size=config.batch_size)
    check_above_zero(learning_rate=config.learning_rate, scale=config.scale)
    check_seed(config.seed)
    space = check_space(config.ranks)
    shapes = {n: (m.in_features, m.out_features) for n, m in find_targets(model, config.targets).items()}
    if space[-1] > MAX_RANK:
        raise InputError(f"rank {space[-1]} is above {MAX_RANK}, the highest that an adapter may have")
    zeros = np.zeros((len(shapes), len(space)))
    return Gains(shapes=shapes, ranks=space, values=zeros, errors=zeros, chooses=config.method in CHOOSING)


def search_tasks(
    folders: Mapping[str, Path], base: str, config: SearchConfig, *, repeats: int = 1, dtype: str = "auto"
) -> dict[str, Gains]:
    """The gains of each task, searched one after the other on `base`, each in its folder, with `repeats` seeds.

    With several seeds a task's folder holds one for each, `seed-N`, the mean gains, and the first one's update.

    Raises:
        InputError: an unknown base, task or method, or settings that do not fit.
    """
    from lvnas import tasks
    from lvnas.tasks.batches import Collator

    data = {task: tasks.load_task(task) for task in folders}
    for out in folders.values():
        files.check_out(out)
    seeds_of(config, repeats)
    model, processor = bases.load(base, dtype=dtype)
    device = distributed.join()
    model.to(device)
    collate = Collator(processor)

    def batch(examples: list) -> dict[str, torch.Tensor]:
        return {name: value.to(device) for name, value in collate(examples).items()}

    gains = {}
    for task, out in folders.items():
        about = {"base": base, "task": task, "dtype": dtype}
        about["data_sha256"] = data[task].sha256("train", "search")

        def search(config: SearchConfig, out: Path, task: str = task, about: Any = about) -> Gains:
            train, held_out = (
                Shuffled(data[task].splits[split], batch, config.batch_size, config.seed)
                for split in ("train", "search")
            )
            title = f"searching ranks of {base} for {task} ({config.method}, seed {config.seed})"
            return run(model, train, held_out, config, out, title=title, **about)

        gains[task] = run_repeats(search, config, out, repeats)
        if repeats > 1:
            identity = {**about, "config": dataclasses.asdict(config), "repeats": repeats}
            keep_mean(gains[task], identity, out, out / f"seed-{config.seed}")
    return gains


def write_plan(
    out: Path,
    task: str,
    base: str,
    config: SearchConfig,
    gains: Gains,
    ranks: dict[str, int],
    scaling: str,
    **facts: Any,
) -> dict[str, Any]:
    """Writes `out`/ranks.json; `facts` (the budget, the number of repeats) go into its provenance.

    Returns:
        The plan in numbers: file, parameters, modules, share of the highest rank everywhere, histogram of ranks.
    """
    scores = out / (MEAN if facts["repeats"] > 1 else SCORES)
    made = files.provenance(config=dataclasses.asdict(config), scores_sha256=files.sha256(scores), **facts)
    plan = RankPlan(
        ranks=ranks,
        base=base,
        task=task,
        method=config.method,
        space=gains.ranks,
        scale=config.scale,
        scaling=scaling,
        provenance=made,
    )
    if distributed.is_first():
        plan.write(out / RANKS)
    parameters = plan.parameters(gains.shapes)
    counts = Counter(ranks.values())
    return {
        "ranks": str(out / RANKS),
        "parameters": parameters,
        "modules": sum(rank > 0 for rank in ranks.values()),
        "share_of_highest": parameters / gains.parameters()[:, -1].sum(),
        "histogram": {str(rank): counts[rank] for rank in gains.ranks},
    }


def parse_ranks(text: str) -> list[int]:
    """`"4,8,16"` -> [4, 8, 16].

    Raises:
        InputError: not a comma-separated list of different whole numbers >= 0.
    """
    try:
        return check_space(int(part) for part in text.split(","))
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"ranks {text!r} are not whole numbers separated by commas, such as 4,8,16"
        ) from None


def parse_options(given: Sequence[str]) -> dict[str, str]:
    """`["batches=8"]` -> {"batches": "8"}.

    Raises:
        InputError: one without "=".
    """
    for text in given:
        if "=" not in text:
            raise InputError(f"option {text!r} is not of the form NAME=VALUE")
    return dict(text.split("=", 1) for text in given)
