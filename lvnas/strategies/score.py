"""Our search: what a held-out batch would lose without each rank block of a short warm-up.

Legend: N modules, K ranks in the space, R highest rank, M scoring batches of b examples.

After the warm-up every update is rotated into its singular basis, largest first, so that a rank block is the
block that a truncation to a lower rank takes away. Then, with the weights frozen and every gate at 1, the
gradient of the search-validation loss in the gates gives each block's loss of removal to second order,

    L(gate 0) - L(gate 1) = -dL/dg + 1/2 F

with F the second moment of the gradient over examples (the empirical Fisher information).

The gain is the geometric mean of that and of the squared singular values, the update's size: the loss of
removal is noisy but knows what matters, the size is exact but does not.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from lvnas.errors import InputError, unknown
from lvnas.strategies.base import Gains, SearchConfig, Stream
from lvnas.strategies.warm import WarmStrategy

COMBINE = ("both", "removal", "size")


class Score(WarmStrategy):
    """Warm-up steps on train, then one backward pass per scoring batch on search-validation."""

    name = "score"

    @dataclass(kw_only=True, slots=True)
    class Options:
        batches: int = 16
        """Scoring batches."""
        combine: str = "both"
        """`both`: the geometric mean; `removal` or `size`: one of the two alone."""

    def __init__(self, model: nn.Module, config: SearchConfig) -> None:
        super().__init__(model, config)
        if self.options.combine not in COMBINE:
            raise unknown("combine", self.options.combine, COMBINE)
        if self.options.batches < 3:
            raise InputError(
                f"batches={self.options.batches}: a variance and its error need at least 3 batches"
            )
        self.steps = config.steps + self.options.batches
        self.sigma: torch.Tensor | None = None
        self.gradients: list[torch.Tensor] = []

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
        removal, error = removal_gains(torch.stack(self.gradients).numpy(), self.config.batch_size)
        assert self.sigma is not None, "the warm-up is over"
        size = self.blocks(self.sigma.double() ** 2)
        if self.options.combine == "size":
            return self.make_gains(size)
        if self.options.combine == "removal":
            return self.make_gains(removal, error)
        kept = np.maximum(removal, 0.0)
        low, high = (np.sqrt(size * np.maximum(removal + sign * error, 0.0)) for sign in (-1, 1))
        return self.make_gains(np.sqrt(size * kept), (high - low) / 2)

    def state(self) -> dict[str, Any]:
        return super().state() | {"sigma": self.sigma, "gradients": self.gradients}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self.sigma, self.gradients = state["sigma"], list(state["gradients"])


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
        return -mean + 0.5 * fisher

    count = len(gradients)
    left_out = np.stack([estimate(np.delete(gradients, i, axis=0)) for i in range(count)])
    spread = ((left_out - left_out.mean(axis=0)) ** 2).sum(axis=0)
    return estimate(gradients), np.sqrt(spread * (count - 1) / count)
