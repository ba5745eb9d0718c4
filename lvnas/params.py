"""`lvnas params`: exact LoRA parameter counts, on the meta device."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from lvnas import bases
from lvnas.errors import InputError
from lvnas.modules import find_targets
from lvnas.ranks import RankPlan, uniform


@dataclass(frozen=True, slots=True)
class Count:
    """LoRA parameters of a plan on a base."""

    parameters: int
    modules: int
    """Modules with a rank above 0."""
    share: float
    """Parameters / the base's parameters."""
    base_parameters: int


def count(
    base: str, *, targets: str | None = None, rank: int | None = None, ranks: Path | None = None
) -> Count:
    """Counts `rank` on all `targets` ("all" by default), or the plan in the file `ranks`.

    Raises:
        InputError: unknown base or targets, both or neither of `rank` and `ranks`, targets beside `ranks`, or a plan
            that does not fit the base.
    """
    if (rank is None) == (ranks is None):
        raise InputError("give either --rank R (with --targets) or --ranks FILE")
    if ranks is not None and targets is not None:
        raise InputError("--targets goes with --rank; a ranks file names its own modules")
    if rank is not None and rank < 0:
        raise InputError(f"rank {rank} is below 0")
    model = bases.meta_model(base)
    linears = find_targets(model, targets or "all") if ranks is None else _linears(model)
    shapes = {name: (linear.in_features, linear.out_features) for name, linear in linears.items()}
    plan = uniform(list(shapes), rank or 0) if ranks is None else RankPlan.read(ranks)
    parameters = plan.parameters(shapes)
    total = sum(parameter.numel() for parameter in model.parameters())
    return Count(parameters, sum(value > 0 for value in plan.ranks.values()), parameters / total, total)


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
