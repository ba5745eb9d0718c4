"""AdaLoRA (arXiv 2303.10512) through PEFT: prunes the least important rank dimensions while it trains.

Its own budget is a sum of ranks, and its `rank_pattern` is boolean masks: it drops the triplets (one rank
dimension of A, E and B) of the lowest importance whatever their module's size. A gain of parameters per rank
times importance makes the allocator do the same under a budget of parameters.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import AdaLoraConfig, get_peft_model
from torch import Tensor, nn

from lvnas import distributed
from lvnas.strategies.base import Gains, NonFiniteLoss, SearchConfig, Strategy, Stream

ADAPTER = "default"


class AdaLora(Strategy):
    """`steps` mini-batches of train, pruning from the highest rank to `target_rank` on AdaLoRA's cubic
    schedule."""

    name = "adalora"

    @dataclass(kw_only=True, slots=True)
    class Options:
        target_rank: int = 0
        """Average rank that AdaLoRA prunes to; 0 for half of the highest."""
        warm_share: float = 0.2
        """Share of the steps before pruning starts."""

    def __init__(self, model: nn.Module, config: SearchConfig) -> None:
        super().__init__(model, config)
        self.steps = config.steps
        highest = max(self.ranks)
        self.peft: Any = get_peft_model(
            model,
            AdaLoraConfig(
                init_r=highest,
                target_r=min(self.options.target_rank or max(1, highest // 2), highest - 1),
                lora_alpha=config.scale * highest,  # type: ignore[arg-type]
                target_modules=list(self.shapes),
                total_step=config.steps,
                tinit=min(int(self.options.warm_share * config.steps), config.steps - 1),
                tfinal=0,
            ),
        )
        self.parameters = {n: p for n, p in self.peft.named_parameters() if p.requires_grad}
        distributed.copy_from_first(self.parameters.values())
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=config.learning_rate, weight_decay=0.0
        )
        self.allocator: Any = self.peft.base_model.rankallocator

    def step(self, index: int, train: Stream, search: Stream) -> float:
        inputs, ids = train[index]
        loss = self.peft.train()(**inputs).loss
        value = distributed.mean(loss.item())
        if not np.isfinite(value):
            raise NonFiniteLoss(value, "train", distributed.gather(ids))
        loss.backward()
        for parameter in self.parameters.values():
            if parameter.grad is None:  # a batch without images does not reach the vision tower
                parameter.grad = torch.zeros_like(parameter)
        distributed.average_gradients(self.parameters.values())
        self.optimizer.step()
        self.peft.base_model.update_and_allocate(index)
        self.optimizer.zero_grad()
        return value

    def gains(self) -> Gains:
        """Importance as `RankAllocator.mask_to_budget` adds it up: E's, and the means of A's and B's."""
        rows = []
        for name, shape in self.shapes.items():
            a, b, e = (self.allocator._element_score(self._key(name, side)) for side in "ABE")
            pairs = torch.cat([a.mean(dim=1, keepdim=True), b.mean(dim=0)[:, None]], dim=1)
            importance = self.allocator._combine_ipt(e, pairs)
            rows.append(sum(shape) * importance.detach().double().cpu().sort(descending=True).values)
        return self.make_gains(self.blocks(torch.stack(rows)))

    def state(self) -> dict[str, Any]:
        return {
            "parameters": {name: parameter.detach() for name, parameter in self.parameters.items()},
            "optimizer": self.optimizer.state_dict(),
            "importance": [getattr(self.allocator, name) for name in ("ipt", "exp_avg_ipt", "exp_avg_unc")],
        }

    def restore(self, state: dict[str, Any]) -> None:
        for name, parameter in self.parameters.items():
            parameter.data.copy_(state["parameters"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        ipt = state["importance"]
        self.allocator.ipt, self.allocator.exp_avg_ipt, self.allocator.exp_avg_unc = ipt

    def update(self) -> dict[str, tuple[Tensor, Tensor]]:
        """A with the singular values E multiplied in, and B."""
        wrapped = self.peft.base_model.model
        layers = {name: wrapped.get_submodule(name) for name in self.shapes}
        return {
            name: ((layer.lora_E[ADAPTER] * layer.lora_A[ADAPTER]).detach(), layer.lora_B[ADAPTER].detach())
            for name, layer in layers.items()
        }

    def close(self) -> nn.Module:
        return self.peft.unload()

    def _key(self, name: str, side: str) -> str:
        # As the allocator names parameters: inside the wrapped model.
        return f"{name}.lora_{side}.{ADAPTER}"
