"""Our search: three independent looks at a short warm-up, multiplied.

Legend: N modules, K ranks in the space, R highest rank, S warm-up steps of b examples.

In the singular basis of the warm-up's update, largest first, a rank block is what a truncation to a lower rank takes
away. A block's gain is the geometric mean of

- its size: the squared singular values that it holds;
- its descent: what the module's own steps took off the loss, the sum of -<gradient, step> with each step measured on
  the batch after it, which it has not seen; a block has its module's, in proportion to its size;
- its loss of removal: the gradient of the loss in a gate on the block gives, to second order,
  L(gate 0) - L(gate 1) = -dL/dg + 1/2 F, with F the second moment of the gradient over examples (the empirical Fisher
  information); a block that overshot (dL/dg > 0) has 1/2 F. It is measured in the second half of the warm-up, on each
  batch before its step, at most MOST_BATCHES.

Size is exact but does not know what matters. The other two know, are noisy, and err differently: one looks at the
whole way, the other at its end. All three come from the warm-up's own gradients; no pass is added.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from lvnas.errors import InputError, unknown
from lvnas.strategies.base import Gains, SearchConfig
from lvnas.strategies.warm import WarmStrategy

PARTS = ("size", "descent", "removal")
FLOOR = 0.1
"""Of a module's descent, in standard errors: noise must not take all ranks from it."""
LEAST_STEPS = 5
"""Removal's variance and its error need at least 3 batches, half of the steps."""
MOST_BATCHES = 16
"""For removal; each keeps N R^2 numbers."""
TINY = 1e-30


class Score(WarmStrategy):
    """Looks at every step of the warm-up."""

    name = "score"

    @dataclass(kw_only=True, slots=True)
    class Options:
        combine: str = "size+descent+removal"
        """The parts of the geometric mean: any of PARTS, joined by +."""

    def __init__(self, model: nn.Module, config: SearchConfig) -> None:
        super().__init__(model, config)
        self.parts = self.options.combine.split("+")
        for part in self.parts:
            if part not in PARTS:
                raise unknown("part of combine", part, PARTS)
        if config.steps < LEAST_STEPS:
            raise InputError(f"steps={config.steps}: score needs at least {LEAST_STEPS}")
        self.products: list[torch.Tensor] = []
        self.descents: list[torch.Tensor] = []

    def observe(self) -> None:
        """The two looks at this step's gradients."""
        parts = [self._product(a) + self._product(b) for a, b in map(self.net.matrices, self.shapes)]
        self.descents.append(torch.stack(parts).double().cpu())
        left = self.config.steps - len(self.descents)
        if 2 * left < self.config.steps and left < MOST_BATCHES:
            self.products.append(self.net.rank_gradients())

    def _product(self, weight: nn.Parameter) -> torch.Tensor:
        """-<gradient, last step> of one matrix; the step from Adam's moments, so that no copy is kept."""
        moments = self.optimizer.state.get(weight)
        if not moments or weight.grad is None:
            return torch.zeros((), device=weight.device)
        group = self.optimizer.param_groups[0]
        first, second = (1 - beta ** moments["step"].item() for beta in group["betas"])
        root = (moments["exp_avg_sq"] / second).sqrt_().add_(group["eps"])
        return group["lr"] * (weight.grad * (moments["exp_avg"] / first) / root).sum().float()

    def gains(self) -> Gains:
        size = self.blocks(self.singular_values().double() ** 2)
        share = size / np.maximum(size.sum(axis=1, keepdims=True), TINY)
        descent, noise = self._descent()
        gradients = self.blocks(self.net.svd_gates(torch.stack(self.products)))
        looks = {
            "size": (size, np.zeros_like(size)),
            "descent": (share * descent[:, None], share * noise[:, None]),
            "removal": removal_gains(gradients, self.config.batch_size),
        }
        values, errors = (np.stack(both) for both in zip(*(looks[part] for part in self.parts), strict=True))
        power = 1 / len(self.parts)
        mean = np.prod(values**power, axis=0)
        relative = errors / np.maximum(values, TINY)
        return self.make_gains(mean, mean * power * np.sqrt((relative**2).sum(axis=0)))

    def _descent(self) -> tuple[np.ndarray, np.ndarray]:
        """Descent of each module over the warm-up, FLOOR standard errors or more; and that error, [N] each."""
        steps = torch.stack(self.descents[1:] or self.descents).numpy()  # nothing came before the first
        error = steps.std(axis=0) * len(steps) ** 0.5
        return np.maximum(steps.sum(axis=0), FLOOR * error), error

    def state(self) -> dict[str, Any]:
        return super().state() | {"products": self.products, "descents": self.descents}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self.products, self.descents = list(state["products"]), list(state["descents"])


def removal_gains(gradients: np.ndarray, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The loss of removing each rank block, to second order, and its standard error over the batches.

    A batch's gradient is the mean over its b examples, so that b times its variance over batches estimates
    the variance over examples: F = b * variance + mean^2.

    Args:
        gradients: [M, N, K], dL/dg of each batch summed over the dimensions of a block.
        batch_size: b.

    Returns:
        [N, K] each; errors by the jackknife.
    """

    def estimate(sample: np.ndarray) -> np.ndarray:
        mean = sample.mean(axis=0)
        fisher = batch_size * sample.var(axis=0, ddof=1) + mean**2
        return np.maximum(-mean, 0.0) + 0.5 * fisher

    count = len(gradients)
    left_out = np.stack([estimate(np.delete(gradients, i, axis=0)) for i in range(count)])
    spread = ((left_out - left_out.mean(axis=0)) ** 2).sum(axis=0)
    return estimate(gradients), np.sqrt(spread * (count - 1) / count)
