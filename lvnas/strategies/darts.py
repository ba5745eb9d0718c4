"""The paper's search (LangVision-LoRA-NAS, arXiv 2508.12512): differentiable selection among nested ranks.

Uniform alpha; in each mini-batch one step of the weights on train and one step of alpha on search-validation
(first-order DARTS, arXiv 1806.09055); at the end the rank of the largest alpha.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lvnas.strategies.base import Gains, SearchConfig, Stream, SupernetStrategy
from lvnas.supernet import slice_masks, superweight_gates


class Darts(SupernetStrategy):
    """Gains are log p: without a budget the argmax decides, with one the most probable plan within it."""

    name = "darts"

    @dataclass(kw_only=True, slots=True)
    class Options:
        alpha_rate: float = 1e-2
        """Adam's rate for alpha; betas (0.5, 0.999) as in DARTS."""
        temperature: float = 1.0
        """p = softmax(alpha / temperature); the paper's is 1."""
        cost_weight: float = 0.0
        """Weight of the expected share of the highest rank's parameters in alpha's loss; the paper's is 0."""
        ramp: int = 0
        """Mini-batches over which the weights' rate rises to its full value."""
        clip: float = math.inf
        """Highest norm of the weights' gradient."""

    def __init__(self, model: nn.Module, config: SearchConfig) -> None:
        super().__init__(model, config)
        self.steps = 2 * config.steps
        self.masks = slice_masks(self.ranks, centred=True)
        self.alpha = torch.zeros(len(self.shapes), len(self.ranks), requires_grad=True)
        self.weight_optimizer = torch.optim.AdamW(
            self.net.weights(), lr=config.learning_rate, weight_decay=0.0
        )
        self.alpha_optimizer = torch.optim.Adam([self.alpha], lr=self.options.alpha_rate, betas=(0.5, 0.999))

    def step(self, index: int, train: Stream, search: Stream) -> float:
        """Even steps train the weights, odd ones alpha."""
        mini_batch, odd = divmod(index, 2)
        gates = self._gates()
        self.net.set_gates(gates.detach())
        for weight in self.net.weights():
            weight.requires_grad_(not odd)
        if not odd:
            loss = self.backward("train", train[mini_batch])
            if math.isfinite(self.options.clip):
                nn.utils.clip_grad_norm_(self.net.weights(), self.options.clip)
            rise = (mini_batch + 1) / self.options.ramp if self.options.ramp else 1.0
            for group in self.weight_optimizer.param_groups:
                group["lr"] = self.config.learning_rate * min(1.0, rise)
            self.weight_optimizer.step()
            self.weight_optimizer.zero_grad()
            return loss
        loss = self.backward("search", search[mini_batch])
        gates.backward(self.net.take_gate_gradients())
        if self.options.cost_weight:
            (self.options.cost_weight * self._expected_cost()).backward()
        self.alpha_optimizer.step()
        self.alpha_optimizer.zero_grad()
        return loss

    def gains(self) -> Gains:
        log_p = torch.log_softmax(self.alpha.detach().double() / self.options.temperature, dim=-1).numpy()
        return self.make_gains(np.diff(log_p, axis=1, prepend=0.0), chooses=True)

    def update(self) -> dict[str, tuple[Tensor, Tensor]]:
        """B diag(m * m) A: what the supernetwork adds with the last alpha."""
        gates = self._gates().detach()
        pairs = zip(super().update().items(), gates, strict=True)
        return {name: (gate.to(a)[:, None] * a, b) for (name, (a, b)), gate in pairs}

    def state(self) -> dict[str, Any]:
        return super().state() | {
            "alpha": self.alpha.detach(),
            "weight_optimizer": self.weight_optimizer.state_dict(),
            "alpha_optimizer": self.alpha_optimizer.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self.alpha.data.copy_(state["alpha"])
        self.weight_optimizer.load_state_dict(state["weight_optimizer"])
        self.alpha_optimizer.load_state_dict(state["alpha_optimizer"])

    def _gates(self) -> Tensor:
        return superweight_gates(self.alpha / self.options.temperature, self.masks)

    def _expected_cost(self) -> Tensor:
        costs = torch.tensor([sum(shape) for shape in self.shapes.values()], dtype=torch.float32)
        p = torch.softmax(self.alpha / self.options.temperature, dim=-1)
        expected = (p @ torch.tensor(self.ranks, dtype=torch.float32)) @ costs
        return expected / (max(self.ranks) * costs.sum())
