"""One cell of the benchmark: a task and a seed, all searches, all budgets, every plan trained and tested."""

import copy
import hashlib
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from population import Population
from suite_tasks import RECIPES, draw, permute_answers
from torch import Tensor

import lvnas
from lvnas import search
from lvnas.allocate import allocate
from lvnas.derive import balanced
from lvnas.strategies import Gains, SearchConfig, make_strategy

METHOD_FILES = (
    "supernet.py",
    "allocate.py",
    "strategies/base.py",
    "strategies/warm.py",
    "strategies/score.py",
)
SPLITS = ("train", "search", "test")


@dataclass(kw_only=True, slots=True)
class Settings:
    """Everything that decides a run's numbers; saved with them."""

    tasks: list[str] = field(default_factory=lambda: ["codes", "rotated", "sorted", "rotated-code"])
    seeds: int = 5
    """Fresh seeds per task, from the hash of the method's source: another method, other seeds."""
    pilot: bool = False
    """Use the seeds 0, 1, ... that methods are developed on."""
    budgets: list[float] = field(default_factory=lambda: [1.0])
    """In units of a uniform rank."""
    ranks: list[int] = field(default_factory=lambda: [0, 1, 2, 4, 8])
    curve: list[int] = field(default_factory=list)
    """Uniform ranks to train as well, whatever the budgets."""
    steps: int = 100
    """Training steps of a plan; those that inherit train as many fewer as their search took."""
    batch_size: int = 16
    warm: int = 12
    """Training steps of every search."""
    search_rate: float = 2e-2
    """Learning rate of every search."""
    rates: list[float] = field(default_factory=lambda: [1.5e-2, 2.5e-2, 4.5e-2])
    """A plan's learning rates; the best on search-validation counts."""
    repeats: int = 2
    """Trainings per plan and rate, each from another A and in another order; their mean counts. One is not enough: its
    spread is as large as that between random plans."""
    clip: float = 0.5
    """Highest norm of a plan's gradient: the base's first losses are high, and Adam would remember them."""
    random: int = 20
    """Random plans per budget."""
    examples: dict[str, int] = field(default_factory=lambda: {"train": 1600, "search": 256, "test": 384})
    together: int = 32
    """Plans in a population; changes the time only."""
    methods: list[str] | None = None
    """Searches to run; all if None."""
    starts: list[str] | None = None
    """How every plan starts, random ones as well: what trained no update of its own inherits that of `svd`. As `STARTS`
    says if None."""


def fresh_seeds(settings: Settings) -> list[int]:
    """The seeds of a run: nobody chooses those of a confirmation."""
    if settings.pilot:
        return list(range(settings.seeds))
    source = Path(lvnas.__file__).parent
    digest = hashlib.sha256(b"".join((source / name).read_bytes() for name in METHOD_FILES)).digest()
    return [
        int(seed) for seed in np.random.default_rng(list(digest)).integers(1 << 20, 1 << 30, settings.seeds)
    ]


class Data:
    """A task's splits as tensors, drawn anew for each seed."""

    def __init__(self, task: str, processor: Any, settings: Settings, seed: int) -> None:
        self.size = settings.batch_size
        self.splits = {
            split: draw(RECIPES[task], split, settings.examples[split], 3 * seed + number, processor)
            for number, split in enumerate(SPLITS)
        }

    def permuted(self) -> "Data":
        """The same with shuffled answers."""
        other = copy.copy(self)
        other.splits = {split: permute_answers(batch, seed=0) for split, batch in self.splits.items()}
        return other

    def stream(self, split: str, seed: int) -> search.Shuffled:
        tensors = self.splits[split]
        return search.Shuffled(
            range(len(tensors["labels"])),
            lambda ids: {name: value[ids] for name, value in tensors.items()},
            self.size,
            seed,
        )


@dataclass(kw_only=True, slots=True)
class Found:
    """What a search gave."""

    gains: Gains
    seconds: float = 0.0
    steps: int = 0
    """Batches that it trained or scored on."""
    update: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Its trained A and B, sorted by singular value."""


SEARCHES: dict[str, tuple[str, dict[str, Any]]] = {
    "score": ("score", {}),
    "svd": ("svd", {}),
    "darts": ("darts", {}),
    "adalora": ("adalora", {"target_rank": 1}),
    "eva": ("eva", {}),
    "uniform": ("uniform", {}),
    "text-only": ("type", {"group": "text"}),
    "vision-only": ("type", {"group": "vision"}),
    "score-permuted": ("score", {}),
    "darts-permuted": ("darts", {}),
    "darts-long": ("darts", {"ramp": 5, "clip": 0.5}),
}
"""Name -> method and its options. `-permuted` searches on data whose answers were shuffled."""
LONGER = {"darts-long": 5}
"""Searches with so many times the steps of the others. Of rates for alpha of 0.01, 0.03, 0.1 and 0.3, tried on the seed
0 of each task (pilot-darts), 0.01 had the best loss on search-validation; it is the default."""
INVERTED = ("score", "darts")
STARTS = {
    "score": ("restart", "charged", "inherit"),
    "svd": ("restart", "inherit"),
    "uniform": ("restart", "inherit"),
}
"""restart: all steps from a fresh A and B = 0; charged: as many fewer as the search took; inherit: those, from the
search's update. `uniform` inherits from `svd`'s warm-up, which searched for nothing; what is not named restarts."""


def search_all(model: Any, data: Data, settings: Settings, seed: int) -> dict[str, Found]:
    """Every method's gains, the controls' and the random plans'."""
    found = {}
    permuted = data.permuted()
    for name, (method, options) in SEARCHES.items():
        if settings.methods and name not in settings.methods:
            continue
        source = permuted if name.endswith("-permuted") else data
        steps = settings.warm * LONGER.get(name, 1)
        found[name] = search_one(model, source, settings, seed, method, options, steps)
        if name in INVERTED:
            found[f"{name}-inverted"] = Found(gains=found[name].gains.inverted())
    for number in range(settings.random):
        config = SearchConfig(method="random", ranks=settings.ranks, seed=(seed % 2**20) * 1000 + number)
        found[f"random-{number}"] = Found(gains=make_strategy(model, config).gains())
    return found


def search_one(
    model: Any, data: Data, settings: Settings, seed: int, method: str, options: dict[str, Any], steps: int
) -> Found:
    start = time.process_time()
    config = SearchConfig(
        method=method,
        ranks=settings.ranks,
        steps=steps,
        batch_size=settings.batch_size,
        learning_rate=settings.search_rate,
        seed=seed,
        options=options,
    )
    torch.manual_seed(seed)
    strategy = make_strategy(model, config)
    search.fit(strategy, data.stream("train", seed), data.stream("search", seed))
    found = Found(gains=strategy.gains(), steps=strategy.steps)
    found.seconds = time.process_time() - start
    found.update = {name: balanced(a, b) for name, (a, b) in strategy.update().items()}
    strategy.close()
    return found


@dataclass(kw_only=True, slots=True)
class Plan:
    """One way to train: ranks, how it starts, how long."""

    method: str
    start: str
    budget: float
    ranks: dict[str, int]
    steps: int
    origin: Found | None = None
    """Whose update it inherits."""


def run_cell(
    model: Any, data: Data, settings: Settings, seed: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A row per search; and one per budget, method, start, learning rate and repeat."""
    torch.manual_seed(seed)
    found = search_all(model, data, settings, seed)
    searches = [
        {
            "seed": seed,
            "method": name,
            "steps": result.steps,
            "seconds": round(result.seconds, 3),
            "scores": [float(f"{value:.4g}") for value in _density(result.gains)],
        }
        for name, result in found.items()
        if result.steps
    ]
    return searches, list(_train_all(model, data, settings, seed, found))


def _density(gains: Gains) -> np.ndarray:
    """Gain per parameter of each module [N], over all its ranks."""
    return gains.totals()[:, -1] / gains.parameters()[:, -1]


def _train_all(
    model: Any, data: Data, settings: Settings, seed: int, found: dict[str, Found]
) -> Iterator[dict[str, Any]]:
    shapes = next(iter(found.values())).gains.shapes
    plans = list(plans_of(found, settings))
    for rank in settings.curve:
        ranks = dict.fromkeys(shapes, rank)
        plans.append(
            Plan(
                method="uniform",
                start="restart",
                budget=rank,
                ranks=ranks,
                steps=settings.steps,
            )
        )
    runs = [(plan, rate) for plan in plans for rate in settings.rates]
    # A population costs as much as its highest rank and trains all its plans for the same number of steps.
    order = sorted(runs, key=lambda run: (run[0].steps, run[0].origin is None, max(run[0].ranks.values())))
    for _, group in itertools.groupby(order, key=lambda run: (run[0].steps, run[0].origin is None)):
        same = list(group)
        for start, repeat in itertools.product(
            range(0, len(same), settings.together), range(settings.repeats)
        ):
            part = same[start : start + settings.together]
            yield from train_plans(model, data, settings, seed, part, shapes, repeat)


def plans_of(found: dict[str, Found], settings: Settings) -> Iterator[Plan]:
    """The plans of all budgets."""
    for budget, (name, result) in itertools.product(settings.budgets, found.items()):
        per_rank = sum(sum(shape) for shape in result.gains.shapes.values())
        ranks = allocate(result.gains, budget * per_rank)
        warm = result if result.update else found.get("svd")
        for start in settings.starts or STARTS.get(name, ("restart",)):
            if start == "inherit" and warm is None:
                continue
            origin = warm if start == "inherit" else None
            yield Plan(
                method=name,
                start=start,
                budget=budget,
                ranks=ranks,
                steps=settings.steps - (0 if start == "restart" else (origin or result).steps),
                origin=origin,
            )


def train_plans(
    model: Any,
    data: Data,
    settings: Settings,
    seed: int,
    runs: Sequence[tuple[Plan, float]],
    shapes: dict[str, tuple[int, int]],
    repeat: int = 0,
) -> Iterator[dict[str, Any]]:
    """Trains (plan, rate) pairs of the same number of steps as one population."""
    began = time.process_time()
    steps = runs[0][0].steps
    start = seed + repeat * 2**31
    population = Population(
        model,
        [plan.ranks for plan, _ in runs],
        [rate for _, rate in runs],
        seed=start,
        starts=[plan.origin.update if plan.origin else None for plan, _ in runs],
    )
    stream = data.stream("train", start + 1)
    for index in range(steps):
        rate = min(1.0, (index + 1) / 5) * (1 - index / steps)
        population.step(stream[index][0], rate, settings.clip)
    validation, test = (population.evaluate(data.splits[split], 64).tolist() for split in ("search", "test"))
    population.close()
    seconds = (time.process_time() - began) / len(runs)
    sizes = {name: sum(shape) for name, shape in shapes.items()}
    for place, (plan, rate) in enumerate(runs):
        yield {
            "seed": seed,
            "budget": plan.budget,
            "method": plan.method,
            "start": plan.start,
            "rate": rate,
            "repeat": repeat,
            "steps": steps,
            "validation": round(validation[place], 5),
            "test": round(test[place], 5),
            "parameters": sum(rank * sizes[name] for name, rank in plan.ranks.items()),
            "uniform_parameters": plan.budget * sum(sizes.values()),
            "seconds": round(seconds, 3),
            "ranks": list(plan.ranks.values()),
        }
