"""`inspect`: descriptions, plans and differences are the sums that one can do by hand."""

import json
from pathlib import Path

import pytest
import torch
from makers import BASE, MODULES, make_adapter
from safetensors.torch import load_file, save_file

from lvnas.adapters import read_adapter
from lvnas.errors import InputError
from lvnas.inspect import adapter_shape, describe, diff, plan, planned_shape, read_shapes
from lvnas.pack import PackOptions, pack

PUBLISHED = Path(__file__).parents[3] / "shared/paper/published_ranks_llama32_11b.json"


def test_an_adapter_described(tmp_path: Path) -> None:
    (found,) = describe(make_adapter(tmp_path / "a", dtype=torch.bfloat16, metadata={"task": "digits"}))
    parameters = sum(rank * (i + o) for i, o, rank in MODULES.values())
    width = sum(i + o for i, o, _ in MODULES.values())
    assert found["parameters"] == parameters
    assert found["layout_bytes"] == {"pad": 32 * width, "group": 32 * width, "ragged": 2 * parameters}
    assert (found["base"], found["max_rank"], found["dtype"], found["task"]) == (
        BASE,
        16,
        "bfloat16",
        "digits",
    )
    assert found["rank_counts"] == {"2": 1, "3": 1, "4": 1, "5": 1, "8": 1, "16": 1}
    assert len(found["files"]["adapter_model.safetensors"]) == 64


@pytest.mark.parametrize("layout", ["pad", "ragged"])
def test_a_packed_adapter_keeps_its_ranks(layout: str, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a")
    pack([read_adapter(folder)], tmp_path / "pack", PackOptions(layout=layout))
    (found,), (original,) = describe(tmp_path / "pack"), describe(folder)
    for key in ("ranks", "parameters", "layout_bytes", "max_rank"):
        assert found[key] == original[key]


def test_a_plan_for_each_layout(tmp_path: Path) -> None:
    names = {"low": (8, 4), "high": (64, 60)}
    for name, (_, rank) in names.items():
        make_adapter(tmp_path / name, {"model.layers.0.q_proj": (32, 16, rank)}, dtype=torch.bfloat16)
    shapes = [adapter_shape(read_adapter(tmp_path / name)) for name in names]
    pad, group, ragged = plan(shapes, adapters=6, slots=2)
    assert pad["device_bytes"] == 2 * 64 * 48 * 2
    assert group["device_bytes"] == 2 * 8 * 48 * 2 + 2 * 64 * 48 * 2
    assert [engine["max_lora_rank"] for engine in group["engines"]] == [8, 64]
    assert ragged["device_bytes"] == 2 * 60 * 48 * 2
    assert ragged["disk_bytes"] == 3 * (60 + 4) * 48 * 2
    with pytest.raises(InputError, match="0 slots"):
        plan(shapes, adapters=6, slots=0)


def test_planning_counts_and_does_not_list(tmp_path: Path) -> None:
    for name, rank in (("low", 4), ("high", 60)):
        make_adapter(tmp_path / name, {"model.layers.0.q_proj": (32, 16, rank)}, dtype=torch.bfloat16)
    shapes = [adapter_shape(read_adapter(tmp_path / name)) for name in ("low", "high")]
    pad, group, ragged = plan(shapes, adapters=10**12 + 1, slots=10**12)
    low, high = 10**12 // 2 + 1, 10**12 // 2
    assert [engine["max_loras"] for engine in group["engines"]] == [low, high]
    assert pad["disk_bytes"] == (8 * low + 64 * high) * 48 * 2
    assert ragged["device_bytes"] == (4 * (low - 1) + 60 * high) * 48 * 2
    assert len(plan(shapes, adapters=1, slots=1)[1]["engines"]) == 1


@pytest.mark.skipif(not PUBLISHED.exists(), reason="the paper's ranks are not beside this checkout")
def test_the_published_ranks_without_weights() -> None:
    shape = planned_shape(PUBLISHED, "llama-3.2-11b-vision")
    assert shape.parameters == 103_255_040
    assert shape.layout_bytes() == {"pad": 537_395_200, "group": 537_395_200, "ragged": 206_510_080}
    pad, _, ragged = plan([shape], adapters=16, slots=8)
    assert pad["device_bytes"] / ragged["device_bytes"] == pytest.approx(2.602, abs=0.001)


def test_a_ranks_file_needs_a_base(tmp_path: Path) -> None:
    (tmp_path / "ranks.json").write_text(json.dumps({"model.language_model.layers.0.mlp.up_proj": 4}))
    with pytest.raises(InputError, match="names no base"):
        read_shapes(tmp_path / "ranks.json")
    (shape,) = read_shapes(tmp_path / "ranks.json", "llama-3.2-11b-vision")
    assert shape.parameters == 4 * (4096 + 14336)


def test_a_plan_without_any_rank(tmp_path: Path) -> None:
    (tmp_path / "zero.json").write_text(json.dumps({"model.language_model.layers.0.mlp.up_proj": 0}))
    with pytest.raises(InputError, match=r"zero\.json gives every module rank 0"):
        read_shapes(tmp_path / "zero.json", "llama-3.2-11b-vision")


def test_differences_from_nothing(tmp_path: Path) -> None:
    """An adapter that was not trained has B = 0: nothing is relative to it."""
    trained = read_adapter(make_adapter(tmp_path / "trained"))
    weights = load_file(make_adapter(tmp_path / "fresh") / "adapter_model.safetensors")
    name = "model.language_model.layers.0.self_attn.q_proj"
    kept = f"base_model.model.{name}.lora_B.weight"
    fresh = {k: torch.zeros_like(v) if k.endswith("lora_B.weight") else v for k, v in weights.items()}
    save_file(fresh, tmp_path / "fresh/adapter_model.safetensors")
    empty = read_adapter(tmp_path / "fresh")
    with pytest.raises(InputError, match=r"fresh has no update.*name trained first"):
        diff(empty, trained)
    assert all(x == pytest.approx(1) for x in diff(trained, empty)["distances"].values())
    assert diff(empty, empty)["largest_distance"] == 0
    save_file(fresh | {kept: weights[kept]}, tmp_path / "fresh/adapter_model.safetensors")
    found = diff(read_adapter(tmp_path / "fresh"), trained)["distances"]
    assert found.pop(name) < 1e-6 and set(found.values()) == {1.0}


def test_differences(tmp_path: Path) -> None:
    first = read_adapter(make_adapter(tmp_path / "a"))
    second = make_adapter(tmp_path / "b")
    weights = load_file(second / "adapter_model.safetensors")
    name = "model.language_model.layers.0.self_attn.q_proj"
    weights[f"base_model.model.{name}.lora_B.weight"] *= 1.5
    save_file(weights, second / "adapter_model.safetensors")
    found = diff(first, read_adapter(second, "b"))
    assert found["distances"].pop(name) == pytest.approx(0.5, rel=1e-6)
    assert max(found["distances"].values()) < 1e-7
    assert (found["only_first"], found["only_second"], found["ranks"]) == ([], [], {})


def test_a_padded_adapter_is_the_same_update(tmp_path: Path) -> None:
    original = read_adapter(make_adapter(tmp_path / "a"))
    manifest = pack([original], tmp_path / "pack")
    packed = read_adapter(tmp_path / "pack" / manifest["adapters"][0]["path"], "packed")
    found = diff(original, packed)
    assert found["largest_distance"] < 1e-6
    assert found["ranks"]["model.language_model.layers.0.self_attn.q_proj"] == [4, 16]


def test_the_command_prints_json_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    from lvnas.cli import lvnas

    folder = make_adapter(tmp_path / "a")
    lvnas.main(["inspect", str(folder), "--json", "--png", str(tmp_path / "map.png")], standalone_mode=False)
    (found,) = json.loads(capsys.readouterr().out)
    assert found["ranks"] == {name: rank for name, (_, _, rank) in MODULES.items()}
    picture = Image.open(tmp_path / "map.png").convert("RGB")
    assert len(picture.getcolors(1 << 24)) > len(set(found["ranks"].values()))
    make_adapter(tmp_path / "b", seed=1)
    lvnas.main(["inspect", str(folder), str(tmp_path / "b"), "--diff", "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["largest_distance"] > 0.5
    with pytest.raises(InputError, match="--diff compares two adapters, not 1"):
        lvnas.main(["inspect", str(folder), "--diff"], standalone_mode=False)
    with pytest.raises(InputError, match="no adapter folder"):
        lvnas.main(["inspect", str(tmp_path / "nowhere")], standalone_mode=False)
