"""Our search: what a short training did with each module, corrected by what the loss asked of it at the base.

A module's gain is a geometric mean, in which size counts twice, of

- its size: the squared norm of its update at the warm-up's end;
- its gradient at the base: its share of ||dL/dB||^2 over all modules, averaged over the first steps of the warm-up,
  whose learning rate still rises. With B = 0, dL/dB is the gradient of the module's weight seen through the random A,
  and its squared norm is what a small step of B takes off the loss.

Size alone follows what is easy to change, wherever the training went after its first steps; the gradient knows what
the task needs and not what other modules can do in its place. A rank block has its module's gain in proportion to the
squared singular values that it holds. Both come from the warm-up's own steps; no pass is added.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from lvnas.strategies.base import Gains, SearchConfig
from lvnas.strategies.warm import RAMP, WarmStrategy

WEIGHT = 1 / 3
"""Of the gradient in the geometric mean."""
TINY = 1e-30


class Score(WarmStrategy):
    """Keeps the norms of the warm-up's first gradients."""

    name = "score"

    @dataclass(kw_only=True, slots=True)
    class Options:
        pass

    def __init__(self, model: nn.Module, config: SearchConfig) -> None:
        super().__init__(model, config)
        self.shares: list[torch.Tensor] = []

    def observe(self) -> None:
        """Each module's share of ||dL/dB||^2, [N]: a step counts the same whatever its loss."""
        if len(self.shares) == RAMP:
            return
        pairs = map(self.net.matrices, self.shapes)
        squares = [b.new_zeros(()) if b.grad is None else b.grad.float().square().sum() for _, b in pairs]
        norms = torch.stack(squares).double().cpu()
        self.shares.append(norms / norms.sum().clamp(min=TINY))

    def gains(self) -> Gains:
        size = self.blocks(self.singular_values().double() ** 2)
        shares = torch.stack(self.shares).numpy()
        gradient = shares.mean(axis=0)[:, None]
        values = size * (gradient / np.maximum(size.sum(axis=1, keepdims=True), TINY)) ** WEIGHT
        spread = shares.std(axis=0, ddof=1)[:, None] if len(shares) > 1 else np.full_like(gradient, np.nan)
        relative = spread / len(shares) ** 0.5 / np.maximum(gradient, TINY)
        return self.make_gains(values, WEIGHT * values * relative)

    def state(self) -> dict[str, Any]:
        return super().state() | {"shares": self.shares}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self.shares = list(state["shares"])
