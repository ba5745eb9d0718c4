"""The benchmark's population trainer against PEFT, plan by plan."""

import importlib.util
import math
from pathlib import Path

import pytest
import search_models as models
import torch
from peft import get_peft_model

from lvnas.derive import lora_config
from lvnas.modules import find_targets
from lvnas.ranks import RankPlan

SOURCE = Path(__file__).parents[2] / "benchmarks/rank_search/population.py"
specification = importlib.util.spec_from_file_location("population", SOURCE)
population = importlib.util.module_from_spec(specification)
specification.loader.exec_module(population)


def peft_losses(plan, rate, initial, batches, scale, clip):
    """The losses of one plan trained by PEFT and torch's AdamW from the rows of `initial`."""
    peft = get_peft_model(models.mllama(), lora_config(RankPlan(ranks=plan, scale=scale)))
    for name, rank in plan.items():
        if rank:
            layer = peft.base_model.model.get_submodule(name)
            layer.lora_A["default"].weight.data.copy_(initial[name][:rank])
    weights = [p for p in peft.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
    losses = []
    for batch in batches:
        loss = peft.eval()(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, clip)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("clip", [math.inf, 0.5])
def test_every_plan_trains_as_if_alone(clip):
    names = list(find_targets(models.mllama(), "all"))
    space = [0, 1, 2, 4]
    plans = [{name: space[(i * k + k) % 4] for i, name in enumerate(names)} for k in (1, 2, 3)]
    rates, scale = [1e-2, 3e-3, 1e-2], 1.5
    batches = [models.mllama_batch(seed, size=3) for seed in range(5)]

    model = models.mllama()
    together = population.Population(model, plans, rates, scale=scale, seed=7)
    found = torch.stack([together.step(batch, clip=clip) for batch in batches]).T
    together.close()

    generator = torch.Generator().manual_seed(7)
    initial = {}
    for name in names:
        initial[name] = torch.empty(population.MAX_RANK, model.get_submodule(name).in_features)
        torch.nn.init.kaiming_uniform_(initial[name], a=math.sqrt(5), generator=generator)
    for plan, rate, losses in zip(plans, rates, found, strict=True):
        assert losses.tolist() == pytest.approx(
            peft_losses(plan, rate, initial, batches, scale, clip), rel=1e-4
        )
    assert abs(found[0, -1] - found[2, -1]) > 1e-3


def test_evaluation_does_not_depend_on_the_batch_size():
    names = list(find_targets(models.mllama(), "all"))
    both = population.Population(models.mllama(), [dict.fromkeys(names, 1)] * 2, [1e-2] * 2)
    batch = models.mllama_batch(0, size=6)
    both.step(batch)
    one, two = both.evaluate(batch, size=6), both.evaluate(batch, size=4)
    torch.testing.assert_close(one, two)
    assert one[0] == pytest.approx(one[1].item(), rel=1e-6)
