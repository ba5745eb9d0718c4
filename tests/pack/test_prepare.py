"""Truncation is the best approximation and says its error; conversions and merges equal PEFT's; uploads are whole."""

import copy
import json
import os
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from makers import BASE, MODULES, deltas, make_adapter, make_tensors
from safetensors.torch import load_file, save_file
from test_roundtrip import NAMES, load_base, peft_deltas, save_trained, worst_error
from transformers import MllamaForConditionalGeneration

from lvnas.adapters import read_adapter
from lvnas.errors import InputError
from lvnas.merge import merge
from lvnas.pack import pack
from lvnas.prepare import PackOptions, prepare
from lvnas.sizes import parse_bytes
from lvnas.tensorfile import BrokenFile
from lvnas.verify import verify


def updates(folder: Path) -> dict[str, torch.Tensor]:
    adapter = read_adapter(folder, "x")
    scales = {name: module.scale for name, module in adapter.modules.items()}
    return deltas(load_file(folder / "adapter_model.safetensors"), scales)


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float(torch.linalg.norm(found - wanted) / torch.linalg.norm(wanted))


def best_error(update: torch.Tensor, rank: int) -> float:
    """Eckart-Young, by the singular values of the whole matrix."""
    values = torch.linalg.svdvals(update)
    return float(values[rank:].norm() / values.norm())


@pytest.mark.parametrize("layout", ["pad", "ragged"])
@pytest.mark.parametrize("cut", [{"max_rank": 3}, {"energy": 0.8}, {"params": 900}, {"target_bytes": 6000}])
def test_truncation_is_the_best_one_and_says_its_error(
    cut: dict[str, Any], layout: str, tmp_path: Path
) -> None:
    folder = make_adapter(tmp_path / "a")
    manifest = pack([read_adapter(folder)], tmp_path / "pack", PackOptions(layout=layout, **cut))
    (entry,) = manifest["adapters"]
    wanted, found = updates(folder), updates(tmp_path / "pack" / entry["path"])
    assert entry["truncation_errors"]
    for name, (_, _, rank) in MODULES.items():
        kept = entry["ranks"][name]
        error = best_error(wanted[name], kept)
        assert relative(found[name], wanted[name]) == pytest.approx(error, abs=1e-5)
        assert entry["truncation_errors"].get(name, 0.0) == pytest.approx(error, abs=1e-6)
        assert 1 <= kept <= rank
        if "energy" in cut:
            assert error**2 <= 0.2 + 1e-9 < best_error(wanted[name], kept - 1) ** 2
    if "max_rank" in cut:
        assert entry["ranks"] == {name: min(3, rank) for name, (_, _, rank) in MODULES.items()}
    if "params" in cut:
        widest = max(inputs + outputs for inputs, outputs, _ in MODULES.values())
        assert 900 - widest < entry["parameters"] <= 900
    if "target_bytes" in cut:
        assert entry["bytes"] <= 6000
        assert layout == "pad" or entry["bytes"] > 5000
    assert verify(tmp_path / "pack").problems == []


def test_nothing_is_cut_where_nothing_is_above(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a")
    (entry,) = pack([read_adapter(folder)], tmp_path / "a-pack", PackOptions(layout="ragged", max_rank=16))[
        "adapters"
    ]
    (plain,) = pack([read_adapter(folder)], tmp_path / "b-pack", PackOptions(layout="ragged"))["adapters"]
    assert entry["sha256"] == plain["sha256"]
    assert "truncation_errors" not in entry


def test_parameters_go_where_the_energy_is(tmp_path: Path) -> None:
    names = {"model.layers.0.q_proj": (32, 32, 8), "model.layers.1.q_proj": (32, 32, 8)}
    tensors = make_tensors(names, torch.float32, 0)
    for key in tensors:
        if "layers.1" in key:
            tensors[key] *= 10
    folder = make_adapter(tmp_path / "a", names)
    save_file(tensors, folder / "adapter_model.safetensors")
    ranks = prepare(read_adapter(folder), PackOptions(params=9 * 64), BASE).layout.modules
    assert [module.rank for module in ranks.values()] == [1, 8]


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        ({"max_rank": 0}, "at least 1"),
        ({"energy": 1.5}, "at most 1"),
        ({"energy": 0.0}, "above 0"),
        ({"params": 10}, "rank 1 everywhere has"),
        ({"target_bytes": 100}, "rank 1 everywhere takes"),
        ({"params": 10, "energy": 0.5}, "--energy and --params both cut ranks"),
    ],
)
def test_targets_that_cannot_be_met(cut: dict[str, Any], message: str, tmp_path: Path) -> None:
    adapter = read_adapter(make_adapter(tmp_path / "a"))
    with pytest.raises(InputError, match=message):
        pack([adapter], tmp_path / "pack", PackOptions(**cut))
    assert not list((tmp_path / "pack").glob("*/*")) if (tmp_path / "pack").exists() else True


@pytest.mark.parametrize(
    ("dtype", "wanted", "alpha"), [(torch.float32, "float16", 16), (torch.float16, None, 1 << 20)]
)
def test_values_that_leave_the_element_type(
    dtype: torch.dtype, wanted: str | None, alpha: int, tmp_path: Path
) -> None:
    """By the change of type, or by the scale that `pad` multiplies in."""
    folder = make_adapter(tmp_path / "a", dtype=dtype, lora_alpha=alpha)
    if wanted:
        weights = load_file(folder / "adapter_model.safetensors")
        save_file({n: value * 1e5 for n, value in weights.items()}, folder / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"values up to .* do not fit float16; use --dtype float32"):
        pack([read_adapter(folder)], tmp_path / "pack", PackOptions(dtype=wanted))
    assert not (tmp_path / "pack/manifest.json").exists()


def test_a_rank_above_vllm_s_highest(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", {"model.layers.0.q_proj": (600, 600, 520)})
    with pytest.raises(InputError, match="rank 520 is above 512, vLLM's highest; reduce it with --max-rank"):
        pack([read_adapter(folder)], tmp_path / "pack")
    assert (
        pack([read_adapter(folder)], tmp_path / "pack2", PackOptions(max_rank=512))["adapters"][0]["max_rank"]
        == 512
    )


@pytest.fixture(params=["pissa", "olora"])
def changed(
    request: pytest.FixtureRequest, base_folder: Path, tmp_path: Path
) -> tuple[Path, dict[str, torch.Tensor]]:
    """An adapter trained from an initialisation that changes the base, with its initial state; and the trained model's
    weights less the untouched base's."""
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(NAMES), init_lora_weights=request.param)
    model = peft.get_peft_model(copy.deepcopy(load_base(base_folder)), config)
    model.peft_config["default"].base_model_name_or_path = str(base_folder)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = request.param
    torch.manual_seed(3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight += 0.05 * torch.randn_like(weight)
    model.save_pretrained(tmp_path / "trained")
    before, after = load_base(base_folder).state_dict(), model.merge_and_unload().state_dict()
    return tmp_path, {name: (after[f"{name}.weight"] - before[f"{name}.weight"]).double() for name in NAMES}


def test_adapters_that_changed_their_base_become_plain(
    changed: tuple[Path, dict[str, torch.Tensor]], base_folder: Path
) -> None:
    folder, wanted = changed
    adapter = read_adapter(folder / "trained")
    for place, options, base in (
        ("by-initial", PackOptions(layout="ragged", initial_adapter=folder / "initial"), str(base_folder)),
        ("by-base", PackOptions(layout="ragged"), str(base_folder)),
        ("padded", PackOptions(), str(base_folder)),
    ):
        (entry,) = pack([adapter], folder / place, options, base)["adapters"]
        assert set(entry["ranks"].values()) == {8}
        assert worst_error(peft_deltas(base_folder, folder / place / entry["path"]), wanted) < 1e-4, place


def test_they_are_refused_with_the_way_out(tmp_path: Path) -> None:
    for init in ("pissa", "olora", "corda", "lora_ga", "pissa_niter_4"):
        adapter = read_adapter(make_adapter(tmp_path / init, init_lora_weights=init))
        with pytest.raises(
            InputError, match=rf"initialised with {init}, which changed the base; give .*--initial-adapter"
        ):
            pack([adapter], tmp_path / "pack")
    wrong = PackOptions(
        initial_adapter=make_adapter(tmp_path / "wrong", {"model.layers.0.q_proj": (4, 4, 2)})
    )
    with pytest.raises(InputError, match="is not the initial adapter"):
        pack([adapter], tmp_path / "pack", wrong)


def test_saved_modules_are_refused_or_separated(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", modules_to_save=["lm_head"])
    tensors = load_file(folder / "adapter_model.safetensors") | {
        "base_model.model.lm_head.weight": torch.ones(5, 3)
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(BrokenFile, match="modules-to-save"):
        pack([read_adapter(folder)], tmp_path / "pack")
    (entry,) = pack([read_adapter(folder)], tmp_path / "pack", PackOptions(separate_saved=True))["adapters"]
    place = tmp_path / "pack" / entry["path"]
    assert torch.equal(
        load_file(place / "modules_to_save.safetensors")["base_model.model.lm_head.weight"], torch.ones(5, 3)
    )
    assert not any("lm_head" in name for name in load_file(place / "adapter_model.safetensors"))
    assert verify(tmp_path / "pack").problems == []


def test_merged_equals_peft(base_folder: Path, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(NAMES), rank_pattern={"q_proj": 2})
    folder = save_trained(base_folder, tmp_path / "adapter", config, torch.float32)
    adapter = read_adapter(folder)
    merge(adapter.modules, base_folder, tmp_path / "merged")
    found = MllamaForConditionalGeneration.from_pretrained(tmp_path / "merged").state_dict()
    model = peft.PeftModel.from_pretrained(copy.deepcopy(load_base(base_folder)), folder)
    wanted = model.merge_and_unload().state_dict()
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(found[name], load_base(base_folder).state_dict()[name]) for name in wanted)
    with pytest.raises(InputError, match="exists; name a new folder"):
        merge(adapter.modules, base_folder, tmp_path / "merged")


def test_merging_into_another_base(base_folder: Path, tmp_path: Path) -> None:
    adapter = read_adapter(make_adapter(tmp_path / "a"))
    with pytest.raises((InputError, BrokenFile), match=r"another base|shape-mismatch"):
        merge(adapter.modules, base_folder, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_the_command_from_start_to_end(
    base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lvnas.cli import lvnas

    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(NAMES))
    folder = save_trained(base_folder, tmp_path / "digits", config, torch.float32)
    arguments = ["pack", f"first={folder}", "--out", str(tmp_path / "pack"), "--params", "0.4k", "--json"]
    lvnas.main(arguments, standalone_mode=False)
    manifest = json.loads(capsys.readouterr().out)
    assert manifest["adapters"][0]["name"] == "first"
    assert manifest["adapters"][0]["parameters"] <= 400
    lvnas.main(["verify", str(tmp_path / "pack")], standalone_mode=False)
    assert "all as packed" in capsys.readouterr().out
    lvnas.main(["pack", str(folder), "--merge", "--out", str(tmp_path / "merged")], standalone_mode=False)
    assert (tmp_path / "merged/model.safetensors").exists()
    lvnas.main(["inspect", str(tmp_path / "pack"), "--plan", "--slots", "2"], standalone_mode=False)
    assert "ragged" in capsys.readouterr().out
    with pytest.raises(InputError, match="shape-mismatch"):
        make_adapter(tmp_path / "foreign", base_model_name_or_path=str(base_folder))
        lvnas.main(["pack", str(tmp_path / "foreign"), "--out", str(tmp_path / "p2")], standalone_mode=False)
    assert not (tmp_path / "p2").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([""], "ADAPTER '' names no place"),
        (["x="], "ADAPTER 'x=' names no place"),
        (["a", "--params", "1e999"], "budget '1e999' is not a number of parameters"),
        (["a", "--target-bytes", "9" * 400], "9+' is no size"),
        (["a", "--initial-adapter", "nowhere"], "initial adapter 'nowhere' has no use.*leave"),
    ],
)
def test_what_the_command_refuses(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lvnas.cli import lvnas

    make_adapter(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        lvnas.main(["pack", *arguments, "--out", "pack"], standalone_mode=False)
    assert not (tmp_path / "pack").exists()


def test_nothing_of_this_machine_is_in_a_pack(tmp_path: Path) -> None:
    pack([read_adapter(make_adapter(tmp_path / "a"))], tmp_path / "pack")
    for path in (tmp_path / "pack").rglob("*"):
        if path.is_file() and path.name != "provenance.json":
            assert os.fsencode(tmp_path) not in path.read_bytes()


@pytest.mark.parametrize(
    ("text", "size"),
    [("4096", 4096), ("100MB", 10**8), ("1.5g", 1_500_000_000), ("512MiB", 1 << 29), ("2 KiB", 2048)],
)
def test_sizes_as_people_write_them(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "0", "-5MB", "MB", "1e400", "5TB", "nan"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(InputError, match="write it like 100MB"):
        parse_bytes(text)
