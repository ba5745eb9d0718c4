"""Trains many rank plans of one base at once, each exactly as if alone.

Legend: P plans, b examples per batch, D input, O output, R highest rank, T tokens.

The batch is repeated P times, plan by plan, through the frozen base; each target module adds s * B_p A_p x to the
rows of plan p. Every plan sees the same examples in the same order and starts from the same A (its leading rows), so
that differences between plans are differences of ranks alone. A rank below R is A and B that start at zero there:
their gradients are zero, so that they stay so.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

BETAS, EPSILON = (0.9, 0.999), 1e-8


class PopulationLinear(nn.Module):
    """A frozen linear layer with P LoRAs: rows of x [P * n, ..., D] in P equal parts, plan by plan."""

    def __init__(self, base: nn.Linear, a: Tensor, b: Tensor, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)  # [P, R, D], [P, O, R]

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(self.a.shape[0], -1, x.shape[-1])
        base = self.base(x)
        hidden = torch.bmm(rows, self.a.mT)
        return torch.baddbmm(base.view(*rows.shape[:2], -1), hidden, self.b.mT, alpha=self.scale).view_as(
            base
        )


class Population:
    """P rank plans on one model; `close` puts the model's own layers back.

    Args:
        model: the base; frozen.
        plans: module -> rank, per plan.
        rates: AdamW's learning rate, per plan.
        seed: of A, the same for every plan.
        starts: per plan, module -> (A [R', D], B [O, R']) to truncate to the plan's rank in place of a fresh A and
            B = 0; the matrices must be sorted by importance.
    """

    def __init__(
        self,
        model: nn.Module,
        plans: Sequence[Mapping[str, int]],
        rates: Sequence[float],
        *,
        scale: float = 1.0,
        seed: int = 0,
        starts: Sequence[Mapping[str, tuple[Tensor, Tensor]] | None] | None = None,
    ) -> None:
        self.model = model.requires_grad_(False).eval()
        self.size = len(plans)
        self.rates = torch.tensor(rates).view(-1, 1, 1)
        generator = torch.Generator().manual_seed(seed)
        self.layers: dict[str, PopulationLinear] = {}
        for name in plans[0]:
            base = model.get_submodule(name)
            ranks = [plan[name] for plan in plans]
            highest = max(*ranks, 1)
            fresh = torch.empty(MAX_RANK, base.in_features)
            nn.init.kaiming_uniform_(fresh, a=math.sqrt(5), generator=generator)
            a = torch.zeros(self.size, highest, base.in_features)
            b = torch.zeros(self.size, base.out_features, highest)
            for p, rank in enumerate(ranks):
                start = starts[p] if starts else None
                a[p, :rank] = (start[name][0] if start else fresh)[:rank]
                if start:
                    b[p, :, :rank] = start[name][1][:, :rank]
            self.layers[name] = PopulationLinear(base, a, b, scale)
            _replace(model, name, self.layers[name])
        self.weights = [w for layer in self.layers.values() for w in (layer.a, layer.b)]
        self.moments = [(torch.zeros_like(w), torch.zeros_like(w)) for w in self.weights]
        self.steps = 0

    def losses(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Mean answer-token cross-entropy of each plan on a batch, [P]."""
        repeated = {k: v.repeat(self.size, *[1] * (v.dim() - 1)) for k, v in inputs.items() if k != "labels"}
        hidden = self.model.model(**repeated).last_hidden_state
        targets = inputs["labels"][:, 1:]
        places = (targets != -100).nonzero()  # only the answer's tokens go through the head
        hidden = hidden.view(self.size, *targets.shape[:1], -1, hidden.shape[-1])
        chosen = hidden[:, places[:, 0], places[:, 1]]
        logits = self.model.lm_head(chosen)
        answers = targets[places[:, 0], places[:, 1]].expand(self.size, -1)
        losses = nn.functional.cross_entropy(logits.flatten(0, 1), answers.flatten(), reduction="none")
        return losses.view(self.size, -1).mean(dim=1)

    def step(self, inputs: Mapping[str, Tensor], rate: float = 1.0, clip: float = math.inf) -> Tensor:
        """One AdamW step (no weight decay) at `rate` times each plan's learning rate; returns the losses [P].

        Each plan's gradient is scaled to a norm of `clip` at most.
        """
        losses = self.losses(inputs)
        gradients = torch.autograd.grad(losses.sum(), self.weights, allow_unused=True)
        if math.isfinite(clip):
            gradients = _clipped(gradients, clip)
        self.steps += 1
        correction = [1 - beta**self.steps for beta in BETAS]
        with torch.no_grad():
            for weight, (mean, square), gradient in zip(self.weights, self.moments, gradients, strict=True):
                if gradient is None:
                    continue
                mean.lerp_(gradient, 1 - BETAS[0])
                square.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
                update = (mean / correction[0]) / ((square / correction[1]).sqrt() + EPSILON)
                weight.sub_(rate * self.rates * update)
        return losses.detach()

    @torch.no_grad()
    def evaluate(self, inputs: Mapping[str, Tensor], size: int = 16) -> Tensor:
        """Mean answer-token cross-entropy of each plan over all examples of `inputs`, [P]."""
        total, count = torch.zeros(self.size), 0
        for start in range(0, len(inputs["labels"]), size):
            part = {name: value[start : start + size] for name, value in inputs.items()}
            tokens = int((part["labels"][:, 1:] != -100).sum())
            total += self.losses(part) * tokens
            count += tokens
        return total / count

    def close(self) -> nn.Module:
        for name, layer in self.layers.items():
            _replace(self.model, name, layer.base)
        return self.model


MAX_RANK = 64
"""A is always drawn at this rank, so that it does not depend on the highest rank among the plans."""


def _clipped(gradients: Sequence[Tensor | None], clip: float) -> list[Tensor | None]:
    """As `torch.nn.utils.clip_grad_norm_`, plan by plan."""
    norm = sum(g.square().sum(dim=(1, 2)) for g in gradients if g is not None).sqrt()
    factor = (clip / (norm + 1e-6)).clamp(max=1.0).view(-1, 1, 1)
    return [None if g is None else g * factor for g in gradients]


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)
