"""`lvnas.find_ranks`: a model and calibration data in, a `peft.LoraConfig` with a rank per module out."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig
from torch import nn

from lvnas import distributed
from lvnas.allocate import Budget, plan_ranks
from lvnas.derive import lora_config
from lvnas.errors import InputError, check_counts
from lvnas.ranks import RankPlan, check_scaling
from lvnas.repeats import mean_gains, seeds_of
from lvnas.search import fit, gains_of
from lvnas.strategies import CHOOSING, Gains, SearchConfig, make_strategy
from lvnas.task_search import no_gains


def find_ranks(
    model: nn.Module,
    dataloader: Iterable[Mapping[str, Any]],
    *,
    budget: Budget | str | int | None = None,
    method: str = "score",
    targets: str | Iterable[str] = "all",
    ranks: Iterable[int] = (4, 8, 16, 32, 64),
    steps: int = 60,
    learning_rate: float = 1e-3,
    scale: float = 1.0,
    scaling: str = "constant",
    seed: int = 0,
    repeats: int = 1,
    max_rank: int | None = None,
    options: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> LoraConfig:
    """Searches a LoRA rank for every target module of `model`; the model comes back unchanged.

    All batches train; under `darts` every second one, and the others choose the ranks. When they run out they are
    used again.

    Args:
        model: the base, without an adapter, on its device.
        dataloader: batches with labels, as `model(**batch)` takes them; at least two. In several processes
            (torchrun, Accelerate) each gives its own; all find the same ranks.
        budget: LoRA parameters ("10M"), or a `lvnas.allocate.Budget`; only `darts` can do without.
        method: a strategy of `lvnas.strategies`.
        targets: groups or module names: `lvnas.modules.find_targets`.
        ranks: the space; 0 allows a module to have no adapter.
        steps, learning_rate, scale, seed, options: see `lvnas.strategies.SearchConfig`.
        scaling: how the scaling of lower ranks differs from `scale`: see `lvnas.ranks.SCALINGS`.
        repeats: searches with so many seeds; the mean decides, the spread gives `Gains.errors`.
        max_rank: highest rank that the plan may have.
        progress: show a bar on stderr.

    Returns:
        A configuration for `peft.get_peft_model`, with `rank_pattern` and `alpha_pattern`; the scores are its
        attribute `lvnas_gains` (`lvnas.strategies.Gains`), which PEFT does not save.

    Raises:
        InputError: bad settings, too little data, a loss that is not finite, or a budget out of reach.
    """
    names = targets if isinstance(targets, str) else ",".join(targets)
    check_scaling(scaling)
    check_counts(steps=steps, repeats=repeats)
    if not isinstance(model, nn.Module) or next(model.parameters(), None) is None:
        raise InputError(f"model is a {type(model).__name__} without parameters; expected a torch.nn.Module")
    device = next(model.parameters()).device
    streams = 2 if method in CHOOSING else 1
    batches = list(itertools.islice(dataloader, max(streams * steps, 2)))
    if len(batches) < 2:
        raise InputError(f"the dataloader gave {len(batches)} batches; a search needs at least 2")
    config = SearchConfig(
        method=method,
        targets=names,
        ranks=list(ranks),
        scale=scale,
        steps=steps,
        batch_size=sum(distributed.gather([_size(batches[0])])),
        learning_rate=learning_rate,
        seed=seed,
        options=dict(options or {}),
    )
    if not isinstance(budget, Budget):
        budget = Budget(params=budget)
    plan_ranks(no_gains(model, config), budget, max_rank=max_rank)  # refuses what it would after the search
    train, held_out = Cycle(batches[::streams], device), Cycle(batches[streams - 1 :: streams], device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        gains = mean_gains(
            [_search(model, one, train, held_out, progress) for one in seeds_of(config, repeats)]
        )
    plan = RankPlan(
        ranks=plan_ranks(gains, budget, max_rank=max_rank),
        method=method,
        space=gains.ranks,
        scale=scale,
        scaling=scaling,
    )
    found: Any = lora_config(plan)
    found.lvnas_gains = gains
    return found


def _search(
    model: nn.Module, config: SearchConfig, train: "Cycle", held_out: "Cycle", progress: bool
) -> Gains:
    """The gains of one search; `model` comes back as it was."""
    training = model.training
    grads = {name: p.requires_grad for name, p in model.named_parameters()}
    torch.manual_seed(config.seed)
    strategy = make_strategy(model, config)
    try:
        title = f"searching ranks ({config.method}, seed {config.seed})" if progress else None
        fit(strategy, train, held_out, title=title)
        return gains_of(strategy)
    finally:
        strategy.close()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(grads[name])
        model.train(training)


class Cycle:
    """A list of batches as an endless `Stream` on a device; the ids are the batch's number in the list."""

    def __init__(self, batches: Sequence[Mapping[str, Any]], device: torch.device) -> None:
        self.batches, self.device = batches, device

    def __getitem__(self, index: int) -> tuple[Mapping[str, Any], list[int]]:
        number = index % len(self.batches)
        return _to(self.batches[number], self.device), [number]


def _size(batch: Mapping[str, Any]) -> int:
    if not isinstance(batch, Mapping):
        raise InputError(
            f"a batch is a {type(batch).__name__}; expected what `model(**batch)` takes, with labels"
        )
    known = [name for name in ("input_ids", "labels", "pixel_values") if name in batch]
    if not known:
        raise InputError(
            f"a batch has {', '.join(batch) or 'nothing'}; it needs labels, and what the model takes"
        )
    return len(batch[known[0]])


def _to(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {
        name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()
    }
