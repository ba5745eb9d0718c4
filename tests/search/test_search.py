"""Whole searches on a random tiny Mllama: resume, seeds, folders, NaN."""

import itertools

import numpy as np
import pytest
import search_models as models
import torch

from lvnas import search
from lvnas.errors import InputError
from lvnas.strategies import SearchConfig, make_strategy

SPACE = [0, 1, 2, 4]
TRAINED = ("darts", "score", "svd", "adalora", "eva")


def config(method, **changes):
    settings = {"ranks": SPACE, "steps": 5, "batch_size": 2, "learning_rate": 1e-2}
    return SearchConfig(method=method, **(settings | changes))


class Stream:
    """Batches by number; `poison` maps a number to NaN pixels."""

    def __init__(self, first, poison=()):
        self.first, self.poison = first, poison

    def __getitem__(self, index):
        batch = models.mllama_batch(self.first + index)
        if index in self.poison:
            batch["pixel_values"] = batch["pixel_values"] * torch.nan
        return batch, [2 * index, 2 * index + 1]


class Stop(Exception):
    pass


class Stopping(Stream):
    """A stream that breaks off at its batch `last`."""

    def __init__(self, first, last):
        super().__init__(first)
        self.last = last

    def __getitem__(self, index):
        if index == self.last:
            raise Stop
        return super().__getitem__(index)


TRAIN, SEARCH = Stream(0), Stream(100)


def fitted(settings, path=None, train=TRAIN, held_out=SEARCH):
    model = models.mllama()
    torch.manual_seed(settings.seed)
    strategy = make_strategy(model, settings)
    losses = search.fit(strategy, train, held_out, state_path=path, save_every=1)
    return losses, strategy.gains(), strategy.update()


@pytest.mark.parametrize("method", TRAINED)
def test_interrupted_anywhere_resumes_bit_identically(method, tmp_path):
    losses, gains, update = fitted(config(method))
    stops = [{"train": Stopping(0, last)} for last in (1, 4)]
    if method == "darts":
        stops += [{"held_out": Stopping(100, last)} for last in (0, 2)]
    for number, stop in enumerate(stops):
        path = tmp_path / f"{number}.pt"
        with pytest.raises(Stop):
            fitted(config(method), path, **stop)
        again, gains_again, update_again = fitted(config(method), path)
        assert again == losses
        assert np.array_equal(gains.values, gains_again.values)
        assert np.array_equal(gains.errors, gains_again.errors, equal_nan=True)
        for pair, pair_again in zip(update.values(), update_again.values(), strict=True):
            assert all(itertools.starmap(torch.equal, zip(pair, pair_again, strict=True)))


@pytest.mark.parametrize("method", ("darts", "score", "svd", "adalora", "random", "uniform"))
def test_the_seed_decides(method):
    one, same, other = (fitted(config(method, seed=seed))[1].values for seed in (3, 3, 4))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_alpha_starts_uniform_and_moves_with_the_search_split():
    strategy = make_strategy(models.mllama(), config("darts"))
    assert np.allclose(strategy.gains().totals(), np.log(1 / len(SPACE)))
    strategy.step(0, Stream(0), Stream(100))
    assert strategy.alpha.abs().max() == 0
    before = [weight.clone() for weight in strategy.net.weights()]
    strategy.step(1, Stream(0), Stream(100))
    assert strategy.alpha.abs().max() > 0
    assert all(itertools.starmap(torch.equal, zip(before, strategy.net.weights(), strict=True)))


def test_cost_term_prefers_low_ranks():
    plain, costly = (
        fitted(config("darts", options={"cost_weight": weight, "alpha_rate": 0.1}))[1] for weight in (0, 100)
    )
    ranks = [np.array(SPACE)[gains.totals().argmax(axis=1)].mean() for gains in (plain, costly)]
    assert ranks[1] < ranks[0]


@pytest.mark.parametrize("method", ["darts", "svd", "score"])
def test_gains_that_are_not_finite_are_refused(method):
    """A gradient may overflow in the last step although no loss did."""
    strategy = make_strategy(models.mllama(), config(method))
    search.fit(strategy, TRAIN, SEARCH)
    broken = strategy.alpha.data[3] if method == "darts" else strategy.net.weights()[3].data
    broken[0] = torch.nan
    with pytest.raises(InputError, match=rf"{method} ended with a gain that is not finite.*rate \(0.01\)"):
        search.gains_of(strategy)


def test_options_of_darts_tame_its_first_steps():
    """With the ramp alone the first step is smaller; with the clip alone, its gradient."""
    firsts = []
    for options in ({}, {"ramp": 5}, {"clip": 1e-3}):
        strategy = make_strategy(models.mllama(), config("darts", options=options))
        before = [weight.detach().clone() for weight in strategy.net.weights()]
        strategy.step(0, TRAIN, SEARCH)
        moved = [(w - b).abs().max().item() for w, b in zip(strategy.net.weights(), before, strict=True)]
        moments = [state["exp_avg"].norm().item() for state in strategy.weight_optimizer.state.values()]
        firsts.append((max(moved), sum(moment**2 for moment in moments) ** 0.5))
    assert firsts[1][0] == pytest.approx(firsts[0][0] / 5, rel=1e-3)
    assert firsts[2][1] == pytest.approx(0.1 * 1e-3, rel=1e-2) and firsts[0][1] > 1e-3


@pytest.mark.parametrize("method", TRAINED)
def test_nan_stops_with_step_and_examples_and_keeps_the_state(method, tmp_path):
    path = tmp_path / "state.pt"
    model = models.mllama()
    torch.manual_seed(0)
    strategy = make_strategy(model, config(method))
    with pytest.raises(InputError, match=r"loss is nan on train examples 4, 5; .*state.pt"):
        search.fit(strategy, Stream(0, poison=[2]), Stream(100), state_path=path)
    losses, gains, _ = fitted(config(method))
    again, gains_again, _ = fitted(config(method), path)
    assert again == losses and np.array_equal(gains.values, gains_again.values)


def test_a_search_folder(tmp_path):
    out = tmp_path / "out"
    run = {"base": "tiny", "task": "random", "out": out}
    gains = search.run(models.mllama(), Stream(0), Stream(100), config("score"), **run)
    assert {path.name for path in out.iterdir()} == {"scores.json", "update.safetensors"}
    nothing_left_to_do = search.run(models.mllama(), None, None, config("score"), **run)
    assert np.array_equal(gains.values, nothing_left_to_do.values)
    assert np.array_equal(gains.errors, nothing_left_to_do.errors)
    with pytest.raises(InputError, match="search with steps 5, not 6; use another --out"):
        search.run(models.mllama(), None, None, config("score", steps=6), **run)
    about = run | {"dtype": "float32", "data_sha256": "0" * 64}
    with pytest.raises(InputError, match="search with dtype None, not 'float32'; use another --out"):
        search.run(models.mllama(), None, None, config("score"), **about)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/lvnas.json").write_text("{}")
    with pytest.raises(InputError, match="adapter holds an adapter: choose another --out"):
        search.run(models.mllama(), None, None, config("score"), tmp_path / "adapter")
    (out / "scores.json").unlink()
    search.run(models.mllama(), Stream(0), Stream(100), config("uniform"), **run)
    assert {path.name for path in out.iterdir()} == {
        "scores.json"
    }  # nothing that --inherit could take for its own


def test_a_state_of_another_search_is_refused(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(InputError, match="loss is nan"):
        search.run(models.mllama(), Stream(0, poison=[1]), Stream(100), config("svd"), out, base="tiny")
    with pytest.raises(InputError, match=r"state.pt is of a search with learning_rate 0.01, not 0.1"):
        search.run(
            models.mllama(), Stream(0), Stream(100), config("svd", learning_rate=0.1), out, base="tiny"
        )
    (out / "state.pt").write_bytes(b"junk")
    with pytest.raises(InputError, match="no readable state"):
        search.run(models.mllama(), Stream(0), Stream(100), config("svd"), out, base="tiny")


def test_shuffled_epochs_cover_the_split_and_repeat_by_seed():
    stream = search.Shuffled(list("abcdefgh"), collate=list, size=3, seed=1)
    for epoch in range(3):
        seen = [i for index in range(2) for i in stream[2 * epoch + index][1]]
        assert len(set(seen)) == 6
    again = search.Shuffled(list("abcdefgh"), collate=list, size=3, seed=1)
    assert all(stream[i] == again[i] for i in range(6))
    assert any(stream[i] != stream[i + 2] for i in range(2))
    with pytest.raises(InputError, match="batch size 9"):
        search.Shuffled(list("abcdefgh"), collate=list, size=9, seed=1)


def test_bad_input():
    for bad, message in (
        ({"method": "dart"}, "unknown method 'dart'; allowed: darts, score"),
        ({"method": "darts", "options": {"batches": 3}}, "has no option 'batches'; allowed: alpha_rate"),
        ({"method": "darts", "options": {"alpha_rate": "fast"}}, "expected float"),
        ({"method": "score", "options": {"combine": "sum"}}, "has no option 'combine'; allowed: none"),
        ({"method": "svd", "targets": "c_attn"}, "match no linear module"),
        ({"method": "svd", "ranks": [4]}, "two or more"),
    ):
        with pytest.raises(InputError, match=message):
            make_strategy(models.mllama(), SearchConfig(**({"ranks": SPACE} | bad)))
