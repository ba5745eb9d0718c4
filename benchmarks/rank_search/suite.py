"""One cell of the benchmark: a task and a seed, all searches, all budgets, every plan trained and tested."""

import dataclasses
import hashlib
import random
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from population import Population
from torch import Tensor

import lvnas
from lvnas import search, tasks
from lvnas.allocate import allocate
from lvnas.strategies import Gains, SearchConfig, make_strategy
from lvnas.supernet import factor
from lvnas.tasks.batches import Collator

METHOD_FILES = (
    "supernet.py",
    "allocate.py",
    "search.py",
    "strategies/base.py",
    "strategies/warm.py",
    "strategies/score.py",
)


@dataclass(kw_only=True, slots=True)
class Settings:
    """Everything that decides a run's numbers; saved with them."""

    tasks: list[str] = field(default_factory=lambda: ["codewords", "inverted", "inverted-codewords", "sum"])
    seeds: int = 3
    """Fresh seeds per task, from the hash of the method's source: another method, other seeds."""
    pilot: bool = False
    """Use the seeds 0, 1, ... that methods may be developed on."""
    budgets: list[float] = field(default_factory=lambda: [0.5, 1.0])
    """In units of a uniform rank."""
    ranks: list[int] = field(default_factory=lambda: [0, 1, 2, 4, 8])
    steps: int = 60
    """Training steps of a plan; an inheriting plan trains `warm` fewer."""
    batch_size: int = 8
    warm: int = 24
    """Training steps of every search."""
    scoring: int = 16
    """Scoring batches of `score`."""
    search_rate: float = 5e-3
    """Learning rate of every search."""
    rates: list[float] = field(default_factory=lambda: [5e-3, 1e-2])
    """A plan's learning rates; the best on search-validation counts."""
    random: int = 20
    """Random plans per budget."""
    examples: dict[str, int] = field(default_factory=lambda: {"train": 480, "search": 128, "test": 256})


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
    """A task's splits as tensors; `permuted` gives each training question another one's answer."""

    def __init__(self, task: str, processor: Any, sizes: dict[str, int], *, permuted: bool = False) -> None:
        collate = Collator(processor)
        self.splits = {}
        for name, examples in tasks.load_task(task, sizes).splits.items():
            if permuted:
                answers = [example.assistant for example in examples]
                random.Random(0).shuffle(answers)
                pairs = zip(examples, answers, strict=True)
                examples = [dataclasses.replace(example, assistant=answer) for example, answer in pairs]
            self.splits[name] = collate(examples)

    def stream(self, split: str, size: int, seed: int) -> search.Shuffled:
        tensors = self.splits[split]
        return search.Shuffled(range(len(tensors["labels"])), lambda ids: _rows(tensors, ids), size, seed)


def _rows(tensors: Mapping[str, Tensor], ids: list[int]) -> dict[str, Tensor]:
    rows = {name: value[ids] for name, value in tensors.items()}
    longest = int(rows["attention_mask"].sum(dim=1).max())
    along_text = ("input_ids", "attention_mask", "labels", "cross_attention_mask")
    return {name: value[:, :longest] if name in along_text else value for name, value in rows.items()}


@dataclass(kw_only=True, slots=True)
class Found:
    """What the searches of a cell gave."""

    gains: dict[str, Gains]
    seconds: dict[str, float]
    update: dict[str, tuple[Tensor, Tensor]]
    """Of `score`'s warm-up, sorted by singular value."""


def search_all(model: Any, data: Data, permuted: Data, settings: Settings, seed: int) -> Found:
    """Every method's gains; the three of `score` share a warm-up."""
    found = Found(gains={}, seconds={}, update={})
    for name, method, source, options in (
        ("score", "score", data, {"batches": settings.scoring}),
        ("score-permuted", "score", permuted, {"batches": settings.scoring}),
        ("darts", "darts", data, {}),
        ("adalora", "adalora", data, {"target_rank": 1}),
        ("eva", "eva", data, {}),
        ("uniform", "uniform", data, {}),
        ("text-only", "type", data, {"group": "text"}),
        ("vision-only", "type", data, {"group": "vision"}),
    ):
        start = time.process_time()
        config = SearchConfig(
            method=method,
            ranks=settings.ranks,
            steps=settings.warm,
            batch_size=settings.batch_size,
            learning_rate=settings.search_rate,
            seed=seed,
            options=options,
        )
        torch.manual_seed(seed)
        strategy = make_strategy(model, config)
        streams = (source.stream(split, settings.batch_size, seed) for split in ("train", "search"))
        search.fit(strategy, *streams)
        found.gains[name] = strategy.gains()
        found.seconds[name] = time.process_time() - start
        if name == "score":
            for part in ("removal", "size"):
                strategy.options.combine = part
                found.gains[part] = strategy.gains()
            found.gains["score-inverted"] = found.gains["score"].inverted()
            found.update = {key: _sorted(a, b) for key, (a, b) in strategy.update().items()}
        strategy.close()
    for draw in range(settings.random):
        config = SearchConfig(method="random", ranks=settings.ranks, seed=seed * 1000 + draw)
        found.gains[f"random-{draw}"] = make_strategy(model, config).gains()
    return found


def _sorted(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    u, sigma, vt = factor(b, a)
    root = sigma.sqrt()
    return root[:, None] * vt, u * root


INHERITING = ("uniform", "score", "removal", "size")


def run_cell(
    model: Any, data: Data, permuted: Data, settings: Settings, seed: int
) -> Iterator[dict[str, Any]]:
    """A row per budget, method, start and learning rate."""
    torch.manual_seed(seed)
    found = search_all(model, data, permuted, settings, seed)
    for budget in settings.budgets:
        plans = []
        for name, gains in found.gains.items():
            per_rank = sum(sum(shape) for shape in gains.shapes.values())
            plan = allocate(gains, budget * per_rank)
            plans.append((name, "restart", plan, settings.steps))
            if name in INHERITING:
                plans.append((name, "inherit", plan, settings.steps - settings.warm))
        for start in ("restart", "inherit"):
            chosen = [entry for entry in plans if entry[1] == start]
            yield from _train(model, data, settings, seed, budget, chosen, found)


def _train(
    model: Any, data: Data, settings: Settings, seed: int, budget: float, plans: list, found: Found
) -> Iterator[dict[str, Any]]:
    """Trains plans of one start at every rate, as one population."""
    runs = [(*plan, rate) for rate in settings.rates for plan in plans]
    inherit = plans[0][1] == "inherit"
    began = time.process_time()
    population = Population(
        model,
        [run[2] for run in runs],
        [run[4] for run in runs],
        seed=seed,
        starts=[found.update] * len(runs) if inherit else None,
    )
    stream = data.stream("train", settings.batch_size, seed + 1)
    steps = plans[0][3]
    for index in range(steps):
        population.step(stream[index][0], rate=min(1.0, (index + 1) / 5) * (1 - index / steps))
    validation, test = (population.evaluate(data.splits[split]).tolist() for split in ("search", "test"))
    population.close()
    seconds = (time.process_time() - began) / len(runs)
    for place, (name, start, plan, _, rate) in enumerate(runs):
        shapes = found.gains[name].shapes
        yield {
            "seed": seed,
            "budget": budget,
            "method": name,
            "start": start,
            "rate": rate,
            "steps": steps,
            "validation": validation[place],
            "test": test[place],
            "parameters": sum(rank * sum(shapes[module]) for module, rank in plan.items()),
            "uniform_parameters": budget * sum(sum(shape) for shape in shapes.values()),
            "search_seconds": found.seconds.get(name, 0.0),
            "train_seconds": seconds,
            "ranks": list(plan.values()),
        }
