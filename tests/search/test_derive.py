"""Derived adapters, loaded by PEFT itself."""

import json
import warnings

import pytest
import search_models as models
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from lvnas import inspect, search
from lvnas.adapters import read_adapter
from lvnas.derive import derive, lora_config
from lvnas.errors import InputError
from lvnas.pack import PackOptions, pack
from lvnas.ranks import SCALINGS, RankPlan
from lvnas.strategies import SearchConfig, make_strategy
from lvnas.supernet import Supernet, superweight_gates


def shapes_of(model):
    return Supernet(model, "all", [1, 2]).shapes


@pytest.fixture
def shapes():
    return shapes_of(models.mllama())


def mixed(shapes, space=(0, 1, 2, 4)):
    return RankPlan(
        ranks={name: space[i % len(space)] for i, name in enumerate(shapes)}, scale=2.0, base="tiny"
    )


def load(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message=".*hidden_state.*")
        return PeftModel.from_pretrained(models.mllama(), folder)


def test_restarted_adapter_is_what_the_plan_says(tmp_path, shapes):
    plan = mixed(shapes)
    derive(plan, shapes, tmp_path / "adapter", features={"vision_features": "reference"})
    model = load(tmp_path / "adapter")
    layers = {
        n.removeprefix("base_model.model."): m for n, m in model.named_modules() if hasattr(m, "lora_A")
    }
    assert {name: layer.r["default"] for name, layer in layers.items()} == {
        name: rank for name, rank in plan.ranks.items() if rank
    }
    assert {layer.scaling["default"] for layer in layers.values()} == {2.0}
    trainable = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    assert trainable == plan.parameters(shapes)
    batch = models.mllama_batch()
    assert model(**batch).loss == models.mllama()(**batch).loss
    facts = json.loads((tmp_path / "adapter/lvnas.json").read_text())
    assert facts["format"] == "lvnas-adapter/1" and facts["vision_features"] == "reference"


def test_same_seed_same_bytes(tmp_path, shapes):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        derive(mixed(shapes), shapes, tmp_path / name, seed=seed)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    weights = [load_file(tmp_path / n / "adapter_model.safetensors") for n in "ac"]
    assert any(not torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_the_config_alone_makes_the_same_ranks(shapes):
    model = get_peft_model(models.mllama(), lora_config(mixed(shapes)))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == mixed(shapes).parameters(shapes)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_scalings_in_peft_in_packs_and_in_inspect(scaling, tmp_path, shapes):
    """Highest rank R = 4: s everywhere; s R / r; s sqrt(R / r)."""
    plan = mixed(shapes)
    plan.scaling = scaling
    derive(plan, shapes, tmp_path / "adapter", seed=3)
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if "lora_B" in name:
            tensor.normal_(std=0.2, generator=generator)
    save_file(tensors, tmp_path / "adapter/adapter_model.safetensors", {"format": "pt"})
    wanted = {name: plan.scale_of(rank) for name, rank in plan.ranks.items() if rank}
    assert sorted(set(wanted.values())) == pytest.approx(
        {"constant": [2], "alpha": [2, 4, 8], "rslora": [2, 2 * 2**0.5, 4]}[scaling]
    )

    model = load(tmp_path / "adapter")
    found = {
        name.removeprefix("base_model.model."): layer.scaling["default"]
        for name, layer in model.named_modules()
        if hasattr(layer, "lora_A")
    }
    assert found == pytest.approx(wanted)
    modules = read_adapter(tmp_path / "adapter").modules
    assert {name: module.scale for name, module in modules.items()} == pytest.approx(wanted)
    [described] = inspect.describe(tmp_path / "adapter")
    assert described["scaling"]["lowest"] == pytest.approx(min(wanted.values()))
    assert described["scaling"]["highest"] == pytest.approx(max(wanted.values()))

    batch = models.mllama_batch()
    expected = model.eval()(**batch).loss
    assert abs(expected - models.mllama().eval()(**batch).loss) > 1e-3
    for layout in ("pad", "ragged"):
        pack([read_adapter(tmp_path / "adapter")], tmp_path / layout, PackOptions(layout=layout))
        [packed] = (tmp_path / layout / "adapters").iterdir()
        torch.testing.assert_close(load(packed).eval()(**batch).loss, expected, rtol=1e-5, atol=1e-6)


def test_inheriting_keeps_the_update_under_every_scaling(tmp_path, shapes):
    update = trained_search(tmp_path)
    products = []
    for scaling in SCALINGS:
        plan = RankPlan(ranks=dict.fromkeys(shapes, 1), scale=0.5, scaling=scaling, space=[1, 4])
        derive(plan, shapes, tmp_path / scaling, update=update)
        adapter = read_adapter(tmp_path / scaling)
        products.append([m.scale * b @ a for m in adapter.modules.values() for a, b in [m.factors()]])
    for other in products[1:]:
        torch.testing.assert_close(other, products[0])
    assert adapter.modules[next(iter(shapes))].scale == pytest.approx(0.5 * 2)  # rslora: sqrt(4 / 1)


def trained_search(tmp_path):
    config = SearchConfig(
        method="darts", ranks=[0, 1, 2, 4], steps=4, batch_size=2, learning_rate=3e-2, scale=2.0
    )
    stream = [(models.mllama_batch(seed), [seed]) for seed in range(4)]
    search.run(models.mllama(), stream, stream, config, tmp_path / "search", base="tiny", task="random")
    return tmp_path / "search/update.safetensors"


def test_inherited_adapter_at_full_rank_is_the_trained_update(tmp_path, shapes):
    update = trained_search(tmp_path)
    plan = RankPlan(ranks=dict.fromkeys(shapes, 4), scale=2.0)
    derive(plan, shapes, tmp_path / "adapter", update=update)
    trained, adapter = load_file(update), load_file(tmp_path / "adapter/adapter_model.safetensors")
    moved = 0.0
    for name in shapes:
        expected = trained[f"{name}.B"] @ trained[f"{name}.A"]
        b, a = (adapter[f"base_model.model.{name}.lora_{side}.weight"] for side in "BA")
        torch.testing.assert_close(b @ a, expected, rtol=1e-4, atol=1e-5)
        moved += expected.abs().sum().item()
    assert moved > 1


@pytest.mark.parametrize("method", ["darts", "score"])
def test_inheriting_at_full_rank_is_the_network_that_was_searched(method, tmp_path, shapes):
    """With the gates of `darts`, which scale the rank dimensions."""
    config = SearchConfig(
        method=method, ranks=[0, 1, 2, 4], steps=5, batch_size=2, learning_rate=3e-2, scale=2.0
    )
    stream = [(models.mllama_batch(seed), [seed]) for seed in range(5)]
    strategy = make_strategy(models.mllama(), config)
    search.fit(strategy, stream, stream)
    if method == "darts":
        strategy.net.set_gates(superweight_gates(strategy.alpha.detach(), strategy.masks))
    strategy.net.peft.eval()
    expected = strategy.net.loss(models.mllama_batch())
    tensors = {
        f"{n}.{s}": m.contiguous() for n, p in strategy.update().items() for s, m in zip("AB", p, strict=True)
    }
    save_file(tensors, tmp_path / "update.safetensors", {"scale": "2.0"})
    plan = RankPlan(ranks=dict.fromkeys(shapes, 4), scale=2.0)
    derive(plan, shapes, tmp_path / "adapter", update=tmp_path / "update.safetensors")
    torch.testing.assert_close(load(tmp_path / "adapter").eval()(**models.mllama_batch()).loss, expected)


def test_directions_that_an_update_does_not_have_start_afresh(tmp_path, shapes):
    """A and B of 0 would never have a gradient: a module that no batch reached, a rank above what was trained."""
    update = trained_search(tmp_path)
    tensors = load_file(update)
    unreached, flat = list(shapes)[:2]
    tensors[f"{unreached}.B"].zero_()
    tensors[f"{flat}.B"][:, 1:] = 0
    save_file(tensors, update, {"scale": "2.0"})
    derive(RankPlan(ranks=dict.fromkeys(shapes, 4), scale=2.0), shapes, tmp_path / "adapter", update=update)
    adapter = load_file(tmp_path / "adapter/adapter_model.safetensors")
    for name, inherited in ((unreached, 0), (flat, 1)):
        b, a = (adapter[f"base_model.model.{name}.lora_{side}.weight"] for side in "BA")
        torch.testing.assert_close(b @ a, tensors[f"{name}.B"] @ tensors[f"{name}.A"])
        assert (a.norm(dim=1) > 0).all()
        assert (b.norm(dim=0) > 0).tolist() == [True] * inherited + [False] * (4 - inherited)


def test_names_that_end_alike_are_told_apart():
    """PEFT takes `layers.0.q_proj` for `vision.layers.0.q_proj` too."""
    ranks = {"layers.0.q_proj": 4, "vision.layers.0.q_proj": 0, "vision.layers.0.k_proj": 2}
    model = torch.nn.Module()
    for name in ranks:
        *path, last = name.split(".")
        parent = model
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, torch.nn.Module())
            parent = getattr(parent, part)
        parent.add_module(last, torch.nn.Linear(8, 8))
    peft = get_peft_model(model, lora_config(RankPlan(ranks=ranks)))
    found = {
        n.removeprefix("base_model.model."): m.r["default"]
        for n, m in peft.named_modules()
        if hasattr(m, "lora_A")
    }
    assert found == {name: rank for name, rank in ranks.items() if rank}


def test_inherited_adapter_is_the_best_approximation(tmp_path, shapes):
    update = trained_search(tmp_path)
    trained = load_file(update)
    for scale in (2.0, 0.5):
        derive(RankPlan(ranks=dict.fromkeys(shapes, 1), scale=scale), shapes, tmp_path / "a", update=update)
        adapter = load_file(tmp_path / "a/adapter_model.safetensors")
        for name in shapes:
            product = 2.0 * trained[f"{name}.B"] @ trained[f"{name}.A"]
            b, a = (adapter[f"base_model.model.{name}.lora_{side}.weight"] for side in "BA")
            rest = torch.linalg.matrix_norm(product - scale * b @ a, ord=2)
            torch.testing.assert_close(rest, torch.linalg.svdvals(product)[1], rtol=1e-3, atol=1e-4)


def test_never_replaces_what_it_did_not_make(tmp_path, shapes):
    plan = mixed(shapes)
    (tmp_path / "search").mkdir()
    (tmp_path / "search/ranks.json").write_text("{}")
    with pytest.raises(InputError, match="search holds something else"):
        derive(plan, shapes, tmp_path / "search")
    derive(plan, shapes, tmp_path / "adapter")
    derive(plan, shapes, tmp_path / "adapter", seed=1)
    (tmp_path / "adapter/notes.txt").touch()
    with pytest.raises(InputError, match="adapter holds something else"):
        derive(plan, shapes, tmp_path / "adapter")
    (tmp_path / "adapter/notes.txt").unlink()
    weights = tmp_path / "adapter/adapter_model.safetensors"
    save_file({name: value + 1 for name, value in load_file(weights).items()}, weights)
    for _ in range(2):
        with pytest.raises(InputError, match="adapter holds a trained or packed adapter"):
            derive(plan, shapes, tmp_path / "adapter")
        (tmp_path / "adapter/lvnas.json").unlink(missing_ok=True)  # as PEFT saves it
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "search"]


def test_bad_input(tmp_path, shapes):
    out = tmp_path / "adapter"
    with pytest.raises(InputError, match="every rank of the plan is 0"):
        derive(RankPlan(ranks=dict.fromkeys(shapes, 0)), shapes, out)
    with pytest.raises(InputError, match="not in this base"):
        derive(RankPlan(ranks={"model.nowhere": 4}), shapes, out)
    with pytest.raises(InputError, match="trains nothing leaves no update"):
        derive(mixed(shapes), shapes, out, update=tmp_path / "missing.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors")
    with pytest.raises(InputError, match="is no update of a search"):
        derive(mixed(shapes), shapes, out, update=tmp_path / "broken.safetensors")
    update = trained_search(tmp_path)
    with pytest.raises(InputError, match="more than the rank 4"):
        derive(RankPlan(ranks=dict.fromkeys(shapes, 8)), shapes, out, update=update)
    wider = {name: (d + 1, o) for name, (d, o) in shapes.items()}
    with pytest.raises(InputError, match="the base's is"):
        derive(mixed(shapes), wider, out, update=update)
    assert not out.exists()
