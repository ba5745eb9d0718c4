"""Strategies that look at a short training at the highest rank, the warm-up; `svd` ranks by its size
alone."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lvnas.strategies.base import Gains, SearchConfig, Stream, SupernetStrategy
from lvnas.supernet import factor

RAMP = 5
"""Steps over which the learning rate rises to its full value."""
CLIP = 0.5
"""Highest norm of the gradient: the first losses of a base on a new task can be high, and Adam would remember them."""


class WarmStrategy(SupernetStrategy):
    """Trains A and B at the highest rank for `config.steps` mini-batches of train."""

    def __init__(self, model: nn.Module, config: SearchConfig) -> None:
        super().__init__(model, config)
        self.steps = config.steps
        self.optimizer = torch.optim.AdamW(self.net.weights(), lr=config.learning_rate, weight_decay=0.0)

    def step(self, index: int, train: Stream, search: Stream) -> float:
        loss = self.backward("train", train[index])
        self.observe()
        nn.utils.clip_grad_norm_(self.net.weights(), CLIP)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * min(1.0, (index + 1) / RAMP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def observe(self) -> None:
        """Called in each warm-up step when the gradients are there and the weights have not moved yet."""

    def state(self) -> dict[str, Any]:
        return super().state() | {"optimizer": self.optimizer.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self.optimizer.load_state_dict(state["optimizer"])

    def singular_values(self) -> Tensor:
        """Singular values of every module's update s * B A, [N, R], largest first."""
        pairs = (self.net.matrices(name) for name in self.shapes)
        rows = [self.config.scale * factor(b.detach(), a.detach())[1] for a, b in pairs]
        return torch.stack(rows).float().cpu()


class Svd(WarmStrategy):
    """Gain of a rank block: the squared singular values it holds, the update's squared norm that it keeps."""

    name = "svd"

    @dataclass(kw_only=True, slots=True)
    class Options:
        pass

    def gains(self) -> Gains:
        return self.make_gains(self.blocks(self.singular_values().double() ** 2), np.nan)
