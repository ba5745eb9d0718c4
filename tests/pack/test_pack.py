"""A pack's bytes, its manifest, and what happens when it is written twice, at once, or not to the end."""

import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
import yaml
from makers import BASE, MODULES, make_adapter
from safetensors import safe_open
from safetensors.torch import save_file

from lvnas.adapters import read_adapter
from lvnas.errors import InputError
from lvnas.layouts import LEGAL_RANKS, legal_rank
from lvnas.manifest import read_manifest
from lvnas.pack import PackOptions, pack
from lvnas.packfolder import folder_hash, hash_files
from lvnas.serving import groups, serving_files

GOLDEN = Path(__file__).parent / "golden"
LAYOUTS = ("pad", "group", "ragged")


def golden_adapter(folder: Path) -> Path:
    """Two modules whose values are written down, not drawn: the same with every torch."""
    names = {
        "model.language_model.layers.0.self_attn.q_proj": (4, 3, 2),
        "model.language_model.layers.1.mlp.up_proj": (3, 5, 1),
    }
    make_adapter(folder, names, lora_alpha=3, metadata={"task": "digits", "vision_features": "reference"})
    tensors = {}
    for name, (inputs, outputs, rank) in names.items():
        for part, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
            values = torch.arange(shape[0] * shape[1]).reshape(shape)
            tensors[f"base_model.model.{name}.lora_{part}.weight"] = (values * 0.375 - 1).to(torch.bfloat16)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    """Relative path -> content, of what is the same on every machine."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (".lock", "provenance.json")
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_golden_bytes(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a change of format: LVNAS_WRITE_GOLDEN=1 pytest tests/pack/test_pack.py -k golden."""
    monkeypatch.setattr("lvnas.pack.__version__", "golden")
    pack([read_adapter(golden_adapter(tmp_path / "digits"))], tmp_path / "pack", PackOptions(layout=layout))
    found = tree(tmp_path / "pack")
    if os.environ.get("LVNAS_WRITE_GOLDEN"):
        shutil.rmtree(GOLDEN / layout, ignore_errors=True)
        shutil.copytree(
            tmp_path / "pack", GOLDEN / layout, ignore=shutil.ignore_patterns(".lock", "provenance.json")
        )
    assert found == tree(GOLDEN / layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_input_same_pack(layout: str, tmp_path: Path) -> None:
    for place in ("one", "two/deeper"):
        adapters = [
            read_adapter(make_adapter(tmp_path / place / name, seed=i)) for i, name in enumerate("abc")
        ]
        pack(
            adapters if place == "one" else adapters[::-1],
            tmp_path / place / "pack",
            PackOptions(layout=layout),
        )
    assert tree(tmp_path / "one/pack") == tree(tmp_path / "two/deeper/pack")


def test_folder_names_are_the_hash_of_their_files(tmp_path: Path) -> None:
    manifest = pack([read_adapter(make_adapter(tmp_path / "a"))], tmp_path / "pack")
    folder = tmp_path / "pack" / manifest["adapters"][0]["path"]
    assert folder.name == f"a-{folder_hash(hash_files(folder))}"
    assert manifest["adapters"][0]["files"] == hash_files(folder)
    assert manifest["adapters"][0]["sha256"] == hash_files(folder)["adapter_model.safetensors"]


def test_manifest_says_what_is_there(tmp_path: Path) -> None:
    facts = {"task": "digits", "vision_features": "reference", "pre_image_rows": "transformers"}
    adapter = read_adapter(make_adapter(tmp_path / "a", metadata=facts, dtype=torch.bfloat16))
    manifest = pack([adapter], tmp_path / "pack", PackOptions(layout="ragged"))
    assert (
        manifest
        == read_manifest(tmp_path / "pack")
        == json.loads((tmp_path / "pack/manifest.json").read_text())
    )
    (entry,) = manifest["adapters"]
    assert manifest["base"] == BASE
    assert manifest["serve"] == {"max_loras": 1, "max_lora_rank": 16, "max_cpu_loras": 1}
    assert entry["ranks"] == {name: rank for name, (_, _, rank) in MODULES.items()}
    assert entry["parameters"] == sum(rank * (i + o) for i, o, rank in MODULES.values())
    assert entry["bytes"] == (tmp_path / "pack" / entry["path"] / "adapter_model.safetensors").stat().st_size
    assert (entry["max_rank"], entry["dtype"]) == (16, "bfloat16")
    assert entry["scaling"]["scale"]["model.language_model.layers.0.self_attn.v_proj"] == 2
    assert {key: entry[key] for key in facts} == facts


def test_modules_are_in_the_model_s_order(tmp_path: Path) -> None:
    manifest = pack([read_adapter(make_adapter(tmp_path / "a"))], tmp_path / "pack")
    layers = [
        name.split(".")[3]
        for name in manifest["adapters"][0]["ranks"]
        if "self_attn.q" in name and "language" in name
    ]
    assert layers == ["0", "2", "10"]


def test_the_safetensors_library_reads_a_pack(tmp_path: Path) -> None:
    manifest = pack([read_adapter(make_adapter(tmp_path / "a"))], tmp_path / "pack")
    with safe_open(
        tmp_path / "pack" / manifest["adapters"][0]["path"] / "adapter_model.safetensors", "pt"
    ) as file:
        assert file.metadata() == {"format": "pt"}
        assert len(list(file.keys())) == 2 * len(MODULES)
        for name in file.keys():  # noqa: SIM118
            tensor = file.get_tensor(name)
            rank = MODULES[name.removeprefix("base_model.model.").rpartition(".lora_")[0]][2]
            beyond = tensor[rank:] if "lora_A" in name else tensor[:, rank:]
            assert not beyond.any()
            assert tensor.any()


def test_groups_hold_their_ranks(tmp_path: Path) -> None:
    names = {"low": 4, "middle": 9, "also-low": 8, "one": 1}
    adapters = [
        read_adapter(make_adapter(tmp_path / n, {"model.layers.0.q_proj": (32, 32, r)}))
        for n, r in names.items()
    ]
    manifest = pack(adapters, tmp_path / "pack", PackOptions(layout="group", slots=2))
    found = {group["name"]: (group["adapters"], group["serve"]) for group in manifest["groups"]}
    assert found == {
        "rank-1": (["one"], {"max_loras": 1, "max_lora_rank": 1, "max_cpu_loras": 1}),
        "rank-8": (["also-low", "low"], {"max_loras": 2, "max_lora_rank": 8, "max_cpu_loras": 2}),
        "rank-16": (["middle"], {"max_loras": 1, "max_lora_rank": 16, "max_cpu_loras": 1}),
    }
    serving = tmp_path / "pack" / manifest["serving"]
    script = (serving / "rank-8.sh").read_text()
    assert f"vllm serve {BASE} --enable-lora --max-loras 2 --max-lora-rank 8" in script
    paths = {entry["name"]: entry["path"] for entry in manifest["adapters"]}
    assert f"--lora-modules also-low={paths['also-low']} low={paths['low']} " in script
    models = yaml.safe_load((serving / "litellm.yaml").read_text())["model_list"]
    routes = {m["model_name"]: m["litellm_params"]["api_base"] for m in models}
    assert routes["middle"] == "http://rank-16:8000/v1"
    assert routes["low"] == "http://rank-8:8000/v1"
    documents = list(yaml.safe_load_all((serving / "gateway.yaml").read_text()))
    assert [document["kind"] for document in documents] == ["InferencePool", "HTTPRoute"] * 3
    (rule,) = documents[3]["spec"]["rules"]
    assert [match["headers"][0]["value"] for match in rule["matches"]] == ["also-low", "low"]
    assert rule["backendRefs"][0]["name"] == documents[2]["metadata"]["name"] == "rank-8"


def test_routes_stay_within_the_gateway_s_limit() -> None:
    entries = [{"name": f"a{i:03}", "path": f"adapters/a{i:03}-0", "max_rank": 8} for i in range(130)]
    manifest = {"layout": "group", "base": BASE, "adapters": entries, "groups": groups(entries, None)}
    documents = list(yaml.safe_load_all(serving_files(manifest)["gateway.yaml"]))
    routes = [document for document in documents if document["kind"] == "HTTPRoute"]
    assert [len(route["spec"]["rules"][0]["matches"]) for route in routes] == [64, 64, 2]
    assert len({route["metadata"]["name"] for route in routes}) == 3


def test_legal_ranks_are_vllm_s() -> None:
    lora = pytest.importorskip("vllm.config.lora")
    assert lora.MaxLoRARanks.__args__ == LEGAL_RANKS
    assert [legal_rank(rank) for rank in (1, 2, 8, 9, 64, 65, 512)] == [1, 8, 8, 16, 64, 128, 512]
    with pytest.raises(InputError, match="rank 513 is above 512"):
        legal_rank(513)


def test_adding_and_replacing(tmp_path: Path) -> None:
    out = tmp_path / "pack"
    first = pack([read_adapter(make_adapter(tmp_path / n, seed=i)) for i, n in enumerate("ab")], out)
    second = pack(
        [
            read_adapter(make_adapter(tmp_path / "new" / "b", seed=7)),
            read_adapter(make_adapter(tmp_path / "c")),
        ],
        out,
    )
    assert [entry["name"] for entry in second["adapters"]] == ["a", "b", "c"]
    assert second["adapters"][0] == first["adapters"][0]
    assert second["adapters"][1]["path"] != first["adapters"][1]["path"]
    assert (out / first["adapters"][1]["path"]).is_dir()  # a running server may still hold it


def test_a_pack_stays_one_layout_and_one_base(tmp_path: Path) -> None:
    out = tmp_path / "pack"
    adapter = read_adapter(make_adapter(tmp_path / "a"))
    pack([adapter], out)
    with pytest.raises(InputError, match="layout 'pad', not 'ragged'"):
        pack([adapter], out, PackOptions(layout="ragged"))
    other = read_adapter(make_adapter(tmp_path / "b", base_model_name_or_path="example/other"))
    with pytest.raises(InputError, match="base 'example/tiny-base', not 'example/other'"):
        pack([other], out)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds other files \(notes.txt\)"):
        pack([adapter], tmp_path / "full")


@pytest.mark.parametrize(("key", "value"), [("layout", "stack"), ("dtype", "int8"), ("slots", 0)])
def test_options_are_checked(key: str, value: object) -> None:
    with pytest.raises(InputError, match=str(value)):
        PackOptions(**{key: value})


def test_a_second_run_writes_nothing(tmp_path: Path) -> None:
    adapters = [read_adapter(make_adapter(tmp_path / n, seed=i)) for i, n in enumerate("ab")]
    pack(adapters, tmp_path / "pack")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "pack/adapters").rglob("*")}
    pack(adapters, tmp_path / "pack")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "pack/adapters").rglob("*")} == times


def test_a_damaged_folder_is_not_taken_for_finished(tmp_path: Path) -> None:
    adapter = read_adapter(make_adapter(tmp_path / "a"))
    manifest = pack([adapter], tmp_path / "pack")
    file = tmp_path / "pack" / manifest["adapters"][0]["path"] / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    with pytest.raises(InputError, match="is damaged"):
        pack([adapter], tmp_path / "pack")


def test_concurrent_runs_into_one_pack(tmp_path: Path) -> None:
    """Eight runs, overlapping adapters: the pack is what one run after the other makes."""
    names = [f"a{i}" for i in range(8)]
    adapters = {name: read_adapter(make_adapter(tmp_path / name, seed=i)) for i, name in enumerate(names)}
    errors = []

    def run(start: int) -> None:
        try:
            pack([adapters[names[(start + i) % 8]] for i in range(3)], tmp_path / "pack")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(start,)) for start in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    pack(list(adapters.values()), tmp_path / "alone")
    assert tree(tmp_path / "pack") == tree(tmp_path / "alone")


def test_an_interrupted_run_leaves_no_draft(tmp_path: Path) -> None:
    adapter = read_adapter(make_adapter(tmp_path / "a"))

    def interrupt(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack([adapter], tmp_path / "pack", progress=interrupt)
    assert not list((tmp_path / "pack/adapters").iterdir())
    assert not (tmp_path / "pack/manifest.json").exists()
    pack([adapter], tmp_path / "pack")


@pytest.mark.parametrize("name", ["image", "text"])
def test_a_name_that_would_take_over_the_base_s_requests_is_refused(tmp_path, name):
    adapter = read_adapter(make_adapter(tmp_path / "adapter"), name)
    with pytest.raises(InputError, match="would take over the base's own requests"):
        pack([adapter], tmp_path / "pack")
    assert not (tmp_path / "pack").exists()
