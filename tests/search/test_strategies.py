"""What each strategy's gains mean, on a random tiny Mllama."""

import itertools

import numpy as np
import pytest
import search_models as models
import torch
from test_search import SPACE, Stream, config, fitted

from lvnas import search
from lvnas.allocate import allocate
from lvnas.modules import is_vision
from lvnas.strategies import STRATEGIES, make_strategy
from lvnas.strategies.warm import RAMP

PER_RANK = sum(sum(shape) for shape in make_strategy(models.mllama(), config("uniform")).shapes.values())


def parameters(gains, plan):
    return sum(rank * sum(gains.shapes[name]) for name, rank in plan.items())


@pytest.mark.parametrize("method", STRATEGIES)
def test_every_method_meets_a_budget_and_gives_the_base_back(method):
    model = models.mllama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(0)
    strategy = make_strategy(model, config(method, steps=8))
    search.fit(strategy, Stream(0), Stream(100))
    gains = strategy.gains()
    assert gains.values.shape == gains.errors.shape == (len(strategy.shapes), len(SPACE))
    assert np.isfinite(gains.values).all()
    for rank in (1, 1.5, 3):
        plan = allocate(gains, rank * PER_RANK)
        assert 0.995 * rank * PER_RANK <= parameters(gains, plan) <= rank * PER_RANK
        assert set(plan.values()) <= set(SPACE)
    base = strategy.close()
    assert base.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


def test_uniform_is_uniform_and_spreads_what_is_left():
    gains = make_strategy(models.mllama(), config("uniform")).gains()
    assert set(allocate(gains, 2 * PER_RANK).values()) == {2}
    assert set(allocate(gains, 3 * PER_RANK).values()) == {2, 4}


def test_type_fills_its_group_first():
    gains = make_strategy(models.mllama(), config("type", options={"group": "vision"})).gains()
    plan = allocate(gains, PER_RANK)
    ranks = {
        vision: [rank for name, rank in plan.items() if is_vision(name) == vision] for vision in (True, False)
    }
    assert min(ranks[True]) >= 1
    assert np.mean(ranks[True]) > 2 * np.mean(ranks[False])


def test_random_draws_rank_independently_of_module_size():
    ranks, sizes = [], []
    for seed in range(30):
        gains = make_strategy(models.llama(), config("random", seed=seed)).gains()
        budget = 1.5 * sum(sum(shape) for shape in gains.shapes.values())
        plan = allocate(gains, budget)
        ranks += plan.values()
        sizes += [sum(gains.shapes[name]) for name in plan]
    assert len(set(ranks)) == len(SPACE)
    assert abs(np.corrcoef(ranks, sizes)[0, 1]) < 0.1


def test_svd_gains_are_the_update_s_norm():
    _, gains, update = fitted(config("svd", learning_rate=3e-2))
    for row, (a, b) in zip(gains.totals(), update.values(), strict=True):
        assert row[-1] == pytest.approx((b @ a).square().sum().item(), rel=1e-3)
    assert (np.diff(gains.values[:, 1:] / np.diff(SPACE), axis=1) <= 1e-12).all()


def test_eva_explains_variance_like_a_pca():
    model = models.mllama()
    inputs = []
    name = "model.language_model.layers.0.self_attn.q_proj"
    strategy = make_strategy(model, config("eva", steps=6))
    hook = model.get_submodule(name).register_forward_hook(
        lambda _m, x, _y: inputs.append(x[0].flatten(0, -2))
    )
    search.fit(strategy, Stream(0), Stream(100))
    hook.remove()
    rows = torch.cat(inputs).double()
    variance = torch.linalg.svdvals(rows - rows.mean(dim=0)) ** 2
    expected = (variance / variance.sum())[: max(SPACE)]
    found = strategy.gains().totals()[list(strategy.shapes).index(name), -1] / sum(strategy.shapes[name])
    assert found == pytest.approx(expected.sum().item(), rel=0.05)


def test_adalora_masks_what_its_gains_call_unimportant():
    """Triplets that PEFT's own allocator has pruned must be those that bring the least."""
    torch.manual_seed(0)
    strategy = make_strategy(models.mllama(), config("adalora", steps=30, options={"target_rank": 1}))
    search.fit(strategy, Stream(0), Stream(100))
    kept = {}
    for name in strategy.shapes:
        layer = strategy.peft.base_model.model.get_submodule(name)
        kept[name] = int((layer.lora_E["default"].abs() > 1e-12).sum())
    masks = strategy.allocator.mask_to_budget(strategy.peft.base_model.model, len(kept))
    by_peft = {name: sum(masks[f"{name}.lora_E.default"]) for name in kept}
    assert sum(by_peft.values()) == len(kept)
    sizes = np.array([sum(shape) for shape in strategy.shapes.values()])
    by_importance = strategy.gains().totals()[:, -1] / sizes
    ranks = np.array(list(by_peft.values()))
    assert by_importance[ranks > ranks.mean()].mean() > 2 * by_importance[ranks == 0].mean()


def test_score_finds_the_module_that_the_loss_needs():
    """Labels are made by a base whose one module was changed: that module must gain the most."""
    name = "model.language_model.layers.2.mlp.down_proj"
    teacher = models.mllama()
    with torch.no_grad():
        weight = teacher.get_submodule(name).weight
        generator = torch.Generator().manual_seed(5)
        weight += torch.randn(32, 1, generator=generator) @ torch.randn(1, 48, generator=generator)

    class Taught(Stream):
        def __getitem__(self, index):
            batch = models.mllama_batch(self.first + index, size=16)
            with torch.no_grad():
                answers = teacher(**{k: v for k, v in batch.items() if k != "labels"}).logits.argmax(dim=-1)
            labels = torch.full_like(answers, -100)
            labels[:, 4:] = answers[:, 3:-1]
            return batch | {"labels": labels}, [index]

    settings = config("score", steps=40, learning_rate=1e-2, batch_size=16)
    _, gains, _ = fitted(settings, train=Taught(0), held_out=Taught(500))
    order = np.argsort(-gains.totals()[:, 1] / gains.parameters()[:, 1])
    place = [list(gains.shapes)[i] for i in order].index(name)
    assert place < len(gains.shapes) * 0.15


def test_score_is_size_twice_and_the_gradient_at_the_base():
    """The whole gain by hand: gradients as plain autograd gives them, the update's singular values by a full SVD."""
    torch.manual_seed(0)
    strategy = make_strategy(models.mllama(), config("score", steps=8, learning_rate=3e-3))
    net, train, shares = strategy.net, Stream(0), []
    for index in range(8):
        if index < RAMP:
            bs = [net.matrices(name)[1] for name in strategy.shapes]
            gradients = torch.autograd.grad(net.loss(train[index][0]), bs)
            squares = np.array([gradient.square().sum().item() for gradient in gradients])
            shares.append(squares / squares.sum())
        strategy.step(index, train, Stream(100))
    gradient = np.mean(shares, axis=0)
    gains = strategy.gains()
    for n, name in enumerate(strategy.shapes):
        a, b = net.matrices(name)
        values = torch.linalg.svdvals(b @ a).detach().numpy() ** 2
        blocks = [values[low:high].sum() for low, high in itertools.pairwise([0, *SPACE])]
        share = np.array(blocks) / values.sum()
        expected = share * values.sum() ** (2 / 3) * gradient[n] ** (1 / 3)
        np.testing.assert_allclose(gains.values[n], expected, rtol=1e-3, atol=1e-3 * expected.max())
        error = gains.values[n] / 3 * np.std(shares, axis=0, ddof=1)[n] / len(shares) ** 0.5 / gradient[n]
        np.testing.assert_allclose(gains.errors[n], error, rtol=1e-3)


def test_score_gives_nothing_to_modules_that_the_data_do_not_reach():
    class TextOnly(Stream):
        def __getitem__(self, index):
            batch = models.mllama_batch(self.first + index)
            return {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}, [index]

    _, gains, _ = fitted(config("score", steps=6), train=TextOnly(0), held_out=TextOnly(100))
    totals = dict(zip(gains.shapes, gains.totals()[:, -1], strict=True))
    assert all(total == 0 for name, total in totals.items() if is_vision(name))
    assert sum(total > 0 for name, total in totals.items() if not is_vision(name)) > 10
