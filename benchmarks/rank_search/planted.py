"""A control with a known answer: can a search find low-rank updates that were planted in the base?

A teacher is the base plus random updates of rank r_n in some modules n. A student matches every layer's hidden states,
which, unlike the teacher's output alone, tell the modules apart. A search that works gives the planted modules the
higher gains, and ranks within the planted number of parameters that fit the teacher better than random ones.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from population import Population
from scipy.stats import rankdata, spearmanr
from torch import Tensor, nn

from lvnas import search
from lvnas.allocate import allocate
from lvnas.modules import find_targets
from lvnas.strategies import SearchConfig, make_strategy

LAYERS = ("EncoderLayer", "DecoderLayer")


@contextmanager
def layer_outputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collects the hidden states after every transformer layer, in the order of execution."""
    states: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    layers = [m for m in model.modules() if type(m).__name__.endswith(LAYERS)]
    hooks = [layer.register_forward_hook(keep) for layer in layers]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


class Matching(nn.Module):
    """The base with, as its loss, the mean squared distance to the teacher's hidden states, in units of their size."""

    def __init__(self, base: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.teach = teacher.requires_grad_(False).eval()

    def distances(self, inputs: Mapping[str, Tensor], copies: int = 1) -> Tensor:
        """[copies]: per plan of a population of `copies`."""
        plain = {name: value for name, value in inputs.items() if name != "labels"}
        with torch.no_grad(), layer_outputs(self.teach) as wanted:
            self.teach(**plain)
        repeated = {name: value.repeat(copies, *[1] * (value.dim() - 1)) for name, value in plain.items()}
        with layer_outputs(self.base) as states:
            self.base(**repeated)
        total = torch.zeros(copies)
        for state, target in zip(states, wanted, strict=True):
            difference = state.view(copies, *target.shape) - target
            total = total + difference.square().flatten(1).mean(dim=1) / target.var()
        return total / len(wanted)

    def forward(self, **inputs: Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=self.distances(inputs)[0])


class MatchingPopulation(Population):
    def losses(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return self.model.distances(inputs, self.size)


def plant(teacher: nn.Module, ranks: Mapping[str, int], strength: float, generator: torch.Generator) -> None:
    """Adds to each module's weight a random update of its rank, `strength` times the weight's norm per rank."""
    for name, rank in ranks.items():
        weight = teacher.get_submodule(name).weight.data
        left = torch.randn(weight.shape[0], max(rank, 1), generator=generator)
        right = torch.randn(max(rank, 1), weight.shape[1], generator=generator)
        update = left @ right
        if rank:
            weight += strength * rank**0.5 * weight.norm() / update.norm() * update


def planted(
    make: Callable[[], nn.Module],
    batch: Callable[[int], dict[str, Tensor]],
    *,
    seed: int,
    method: str = "score",
    options: Mapping[str, Any] | None = None,
    share: float = 0.3,
    rank: int = 4,
    strength: float = 0.1,
    warm: int = 60,
    steps: int = 60,
    rate: float = 5e-3,
    draws: int = 20,
) -> dict[str, float]:
    """Plants `rank` in a random `share` of the modules, searches, and trains the found plan among random ones.

    Returns:
        `auc` of planted against other modules by gain per parameter, `spearman` of found and planted ranks, and the
        final losses `found`, `planted` (the truth's ranks), `inverted`, `uniform`, and those of the random plans.
    """
    generator = torch.Generator().manual_seed(seed)
    names = list(find_targets(make(), "all"))
    chosen = torch.rand(len(names), generator=generator).argsort()[: round(share * len(names))].tolist()
    truth = {name: rank if i in chosen else 0 for i, name in enumerate(names)}
    teacher = make()
    plant(teacher, truth, strength, generator)
    student = Matching(make(), teacher)

    class Batches:
        def __init__(self, first: int) -> None:
            self.first = first

        def __getitem__(self, index: int) -> tuple[dict[str, Tensor], list[int]]:
            return batch(self.first + index), [index]

    ranks = [0, 1, 2, 4, 8]
    targets = ",".join(f"base.{name}" for name in names)
    config = SearchConfig(
        method=method,
        targets=targets,
        ranks=ranks,
        steps=warm,
        learning_rate=rate,
        seed=seed,
        batch_size=len(batch(0)["labels"]),
        options=dict(options or {}),
    )
    torch.manual_seed(seed)
    strategy = make_strategy(student, config)
    search.fit(strategy, Batches(seed * 10_000), Batches(seed * 10_000 + 5_000))
    gains = strategy.gains()
    strategy.close()
    budget = sum(truth[name.removeprefix("base.")] * sum(shape) for name, shape in gains.shapes.items())
    plans = {"found": allocate(gains, budget), "inverted": allocate(gains.inverted(), budget)}
    plans["planted"] = {f"base.{name}": value for name, value in truth.items()}
    for draw in range(-1, draws):
        kind = SearchConfig(
            method="random" if draw >= 0 else "uniform", targets=targets, ranks=ranks, seed=draw % 2**31
        )
        plans[f"random-{draw}" if draw >= 0 else "uniform"] = allocate(
            make_strategy(student, kind).gains(), budget
        )
    population = MatchingPopulation(student, list(plans.values()), [rate] * len(plans), seed=seed)
    for index in range(steps):
        population.step(batch(seed * 10_000 + 7_000 + index), rate=1 - index / steps)
    losses = sum(population.evaluate(batch(seed * 10_000 + 9_000 + index)) for index in range(4)) / 4
    population.close()
    final = dict(zip(plans, losses.tolist(), strict=True))
    random_losses = [loss for name, loss in final.items() if name.startswith("random")]
    density = gains.totals()[:, 1:3].sum(axis=1) / gains.parameters()[:, 1]
    return {
        "auc": area(density, np.array(list(truth.values())) > 0),
        "spearman": float(spearmanr(list(plans["found"].values()), list(truth.values())).statistic),
        **{name: final[name] for name in ("found", "planted", "inverted", "uniform")},
        "best_random": min(random_losses),
        "worst_random": max(random_losses),
        "mean_random": float(np.mean(random_losses)),
        "share_of_random_better": float(np.mean(np.array(random_losses) < final["found"])),
    }


def area(scores: np.ndarray, positive: np.ndarray) -> float:
    """Area under the ROC curve of `scores` for the class `positive`."""
    place = rankdata(scores)[positive].sum()
    n, m = positive.sum(), (~positive).sum()
    return float((place - n * (n + 1) / 2) / (n * m))
