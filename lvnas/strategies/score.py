"""Our search: independent looks at a short warm-up, multiplied.

Legend: N modules, K ranks in the space, R highest rank, M scoring batches of b examples, S warm-up steps.

In the warm-up's update, in its singular basis, largest first, a rank block is what a truncation to a lower rank takes
away. A block's gain is the geometric mean of

- its size: the squared singular values that it holds;
- its descent: what the module's own steps in the warm-up took off the loss, the sum of -<gradient, step> with each
  step measured on the batch after it, which it has not seen; a block has its module's, in proportion to its size.

Size is exact but does not know what matters. Descent knows, is noisy, and needs nothing but the warm-up. On request
a third look takes scoring passes after the warm-up:

- the loss of removal: with the weights frozen and every gate at 1, the gradient of the search-validation loss in
  the gates gives, to second order, L(gate 0) - L(gate 1) = -dL/dg + 1/2 F, with F the second moment of the gradient
  over examples (the empirical Fisher information); a block that overshot (dL/dg > 0) has 1/2 F.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from lvnas.errors import InputError, unknown
from lvnas.strategies.base import Gains, SearchConfig, Stream
from lvnas.strategies.warm import WarmStrategy

PARTS = ("size", "descent", "removal")
FLOOR = 0.1
"""Of a module's descent, in standard errors: noise must not take all ranks from it."""
TINY = 1e-30


class Score(WarmStrategy):
    """Warm-up steps on train; then, for `removal`, one backward pass per scoring batch on search-validation."""

    name = "score"

    @dataclass(kw_only=True, slots=True)
    class Options:
        combine: str = "size+descent"
        """The parts of the geometric mean: any of PARTS, joined by +."""
        batches: int = 8
        """Scoring batches of `removal`."""

    def __init__(self, model: nn.Module, config: SearchConfig) -> None:
        super().__init__(model, config)
        self.parts = self.options.combine.split("+")
        for part in self.parts:
            if part not in PARTS:
                raise unknown("part of combine", part, PARTS)
        if self.options.batches < 3:
            raise InputError(
                f"batches={self.options.batches}: a variance and its error need at least 3 batches"
            )
        self.steps = config.steps + ("removal" in self.parts) * self.options.batches
        self.sigma: torch.Tensor | None = None
        self.gradients: list[torch.Tensor] = []
        self.descents: list[torch.Tensor] = []

    def observe(self) -> None:
        """What the last step took off this batch's loss, [N], to first order."""
        parts = [self._product(a) + self._product(b) for a, b in map(self.net.matrices, self.shapes)]
        self.descents.append(torch.stack(parts).double().cpu())

    def _product(self, weight: nn.Parameter) -> torch.Tensor:
        """-<gradient, last step> of one matrix; the step from Adam's moments, so that no copy is kept."""
        moments = self.optimizer.state.get(weight)
        if not moments or weight.grad is None:
            return torch.zeros((), device=weight.device)
        group = self.optimizer.param_groups[0]
        first, second = (1 - beta ** moments["step"].item() for beta in group["betas"])
        root = (moments["exp_avg_sq"] / second).sqrt_().add_(group["eps"])
        return group["lr"] * (weight.grad * (moments["exp_avg"] / first) / root).sum().float()

    def step(self, index: int, train: Stream, search: Stream) -> float:
        if index < self.config.steps:
            return super().step(index, train, search)
        if self.sigma is None:
            self.sigma = self.net.rotate_to_svd()
        for weight in self.net.weights():
            weight.requires_grad_(False)
        loss = self.backward("search", search[index - self.config.steps])
        gradients = self.net.take_gate_gradients()
        self.gradients.append(torch.from_numpy(self.blocks(gradients)))
        return loss

    def gains(self) -> Gains:
        sigma = self.singular_values() if self.sigma is None else self.sigma
        size = self.blocks(sigma.double() ** 2)
        share = size / np.maximum(size.sum(axis=1, keepdims=True), TINY)
        descent, noise = self._descent()
        looks = {"size": (size, np.zeros_like(size))}
        looks["descent"] = (share * descent[:, None], share * noise[:, None])
        if "removal" in self.parts:
            looks["removal"] = removal_gains(torch.stack(self.gradients).numpy(), self.config.batch_size)
        values, errors = (np.stack(both) for both in zip(*(looks[part] for part in self.parts), strict=True))
        power = 1 / len(self.parts)
        mean = np.prod(values**power, axis=0)
        relative = np.where(values > 0, errors / np.maximum(values, TINY), 0.0)
        return self.make_gains(mean, mean * power * np.sqrt((relative**2).sum(axis=0)))

    def _descent(self) -> tuple[np.ndarray, np.ndarray]:
        """Descent of each module over the warm-up, FLOOR standard errors or more; and that error, [N] each."""
        steps = torch.stack(self.descents[1:] or self.descents).numpy()  # nothing came before the first
        error = steps.std(axis=0) * len(steps) ** 0.5
        return np.maximum(steps.sum(axis=0), FLOOR * error), error

    def state(self) -> dict[str, Any]:
        return super().state() | {
            "sigma": self.sigma,
            "gradients": self.gradients,
            "descents": self.descents,
        }

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self.sigma, self.gradients = state["sigma"], list(state["gradients"])
        self.descents = list(state["descents"])


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
