"""EVA (arXiv 2410.07170): ranks by the variance that the principal components of a layer's input explain.

The incremental SVD and its convergence test are PEFT's (`peft.tuners.lora.eva.SVDHook`). EVA's own budget is
a sum of
ranks: it takes the components of the highest explained variance whatever their module's size. A gain of
parameters per rank times explained variance makes the allocator do the same under a budget of parameters.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.eva import SVDHook
from torch import nn

from lvnas import distributed
from lvnas.errors import InputError
from lvnas.strategies.base import Gains, NonFiniteLoss, SearchConfig, Strategy, Stream


class Eva(Strategy):
    """`steps` forward passes of the base on train; a layer whose components have converged is left alone."""

    name = "eva"

    @dataclass(kw_only=True, slots=True)
    class Options:
        tau: float = 0.99
        """Cosine similarity between two updates above which a component has converged (PEFT's default)."""

    def __init__(self, model: nn.Module, config: SearchConfig) -> None:
        distributed.alone("method eva")
        super().__init__(model, config)
        self.steps = config.steps
        self.hooks = {
            name: SVDHook(n_components=min(max(self.ranks), shape[0]), sim_thresh=self.options.tau, name=name)
            for name, shape in self.shapes.items()
        }

    @torch.no_grad()
    def step(self, index: int, train: Stream, search: Stream) -> float:
        handles = [
            self.model.get_submodule(name).register_forward_hook(hook)
            for name, hook in self.hooks.items()
            if not hook.converged.all()
        ]
        inputs, ids = train[index]
        before = self.state()
        try:
            loss = self.model.eval()(**inputs).loss.item()
            if not math.isfinite(loss):
                raise NonFiniteLoss(loss, "train", ids)
            return loss
        except (torch.linalg.LinAlgError, NonFiniteLoss):
            self.restore(before)  # an SVD meets the NaN before the loss does
            raise NonFiniteLoss(math.nan, "train", ids) from None
        finally:
            for handle in handles:
                handle.remove()

    def gains(self) -> Gains:
        rows = []
        for name, hook in self.hooks.items():
            ratios = getattr(hook.svd, "explained_variance_ratio_", None)
            if ratios is None:
                raise InputError(
                    f"eva: the batches have fewer tokens in {name} than the highest rank; enlarge them"
                )
            rows.append(nn.functional.pad(ratios.double().cpu(), (0, max(self.ranks) - len(ratios))))
        sizes = torch.tensor([[sum(shape)] for shape in self.shapes.values()])
        return self.make_gains(self.blocks(sizes * torch.stack(rows)))

    def state(self) -> dict[str, Any]:
        return {
            name: {"converged": hook.converged}
            | {key: value for key, value in vars(hook.svd).items() if key.endswith("_")}
            for name, hook in self.hooks.items()
        }

    def restore(self, state: dict[str, Any]) -> None:
        for name, hook in self.hooks.items():
            saved = dict(state[name])
            hook.converged = saved.pop("converged")
            vars(hook.svd).update(saved)
