"""`verify` finds every change to a pack; `serve` and `inspect` rest on the same reading."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from makers import make_adapter
from safetensors.torch import load_file, save_file

from lvnas.adapters import read_adapter
from lvnas.errors import InputError
from lvnas.pack import PackOptions, pack
from lvnas.packfolder import folder_hash, hash_files
from lvnas.verify import verify

Q = "base_model.model.model.language_model.layers.0.self_attn.q_proj"


def make_pack(tmp_path: Path, layout: str) -> Path:
    adapters = [read_adapter(make_adapter(tmp_path / name, seed=seed)) for seed, name in enumerate("ab")]
    pack(adapters, tmp_path / "pack", PackOptions(layout=layout))
    return tmp_path / "pack"


def folder_of(packed: Path, name: str) -> Path:
    return next((packed / "adapters").glob(f"{name}-*"))


def edit_manifest(packed: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((packed / "manifest.json").read_text())
    change(manifest)
    (packed / "manifest.json").write_text(json.dumps(manifest))


def reseal(packed: Path, name: str) -> None:
    """Makes hashes and names right again, as one would who wants to hide a change."""
    folder = folder_of(packed, name)
    hashes = hash_files(folder)
    renamed = folder.rename(folder.with_name(f"{name}-{folder_hash(hashes)}"))

    def change(manifest: dict[str, Any]) -> None:
        entry = next(entry for entry in manifest["adapters"] if entry["name"] == name)
        entry |= {
            "path": f"adapters/{renamed.name}",
            "files": hashes,
            "sha256": hashes["adapter_model.safetensors"],
        }
        entry["bytes"] = (renamed / "adapter_model.safetensors").stat().st_size

    edit_manifest(packed, change)


def edit_weights(packed: Path, name: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = folder_of(packed, name) / "adapter_model.safetensors"
    tensors = {key: value.clone() for key, value in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("layout", ["pad", "group", "ragged"])
def test_a_pack_as_written_has_no_problems(layout: str, tmp_path: Path) -> None:
    counted: list[int] = []
    verdict = verify(make_pack(tmp_path, layout), counted.append)
    assert (verdict.adapters, verdict.problems, verdict.unlisted) == (2, [], [])
    assert sum(counted) == verdict.bytes > 0


def test_one_flipped_bit(tmp_path: Path) -> None:
    packed = make_pack(tmp_path, "pad")
    path = folder_of(packed, "a") / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    problems = verify(packed).problems
    assert any("adapter_model.safetensors: hash-mismatch" in problem for problem in problems)
    assert all(str(path.parent) in problem for problem in problems)


@pytest.mark.parametrize("file", ["adapter_config.json", "lvnas.json", "README.md"])
def test_small_files_count_too(file: str, tmp_path: Path) -> None:
    packed = make_pack(tmp_path, "ragged")
    with (folder_of(packed, "b") / file).open("a") as out:
        out.write("\n")
    assert any(f"{file}: hash-mismatch" in problem for problem in verify(packed).problems)


def test_an_added_and_a_missing_file(tmp_path: Path) -> None:
    packed = make_pack(tmp_path, "pad")
    (folder_of(packed, "a") / "extra").write_text("")
    (folder_of(packed, "b") / "README.md").unlink()
    problems = "\n".join(verify(packed).problems)
    assert "extra: hash-mismatch: was not packed" in problems
    assert "README.md: missing-file" in problems


RESEALED: dict[str, tuple[str, str, Callable[[dict[str, torch.Tensor]], Any]]] = {
    "a NaN": ("pad", "not-finite", lambda t: t[f"{Q}.lora_A.weight"].fill_(float("nan"))),
    "values in the padding": ("pad", "not-zero", lambda t: t[f"{Q}.lora_A.weight"][4:].fill_(1)),
    "a module gone": ("ragged", "manifest-mismatch: modules", lambda t: [t.pop(k) for k in list(t) if k.startswith(Q)]),
}  # fmt: skip


@pytest.mark.parametrize("name", RESEALED)
def test_changes_that_the_hashes_hide(name: str, tmp_path: Path) -> None:
    layout, reason, change = RESEALED[name]
    packed = make_pack(tmp_path, layout)
    edit_weights(packed, "a", change)
    reseal(packed, "a")
    (problem,) = verify(packed).problems
    assert reason in problem


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("max_rank", lambda m: m["adapters"][0].update(max_rank=8)),
        ("parameters", lambda m: m["adapters"][0].update(parameters=5)),
        ("scale", lambda m: m["adapters"][0].update(scaling={"convention": "folded", "scale": 2.0})),
        ("serve", lambda m: m["serve"].update(max_lora_rank=8)),
        ("groups", lambda m: m["groups"][0]["adapters"].pop()),
        ("base", lambda m: m.update(base="example/other")),
        ("sha256", lambda m: m["adapters"][0].update(sha256="0" * 64)),
    ],
)
def test_a_manifest_that_says_otherwise(
    what: str, change: Callable[[dict[str, Any]], Any], tmp_path: Path
) -> None:
    packed = make_pack(tmp_path, "group")
    edit_manifest(packed, change)
    problems = verify(packed).problems
    assert problems
    assert any(what in problem for problem in problems)


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("path-out-of-pack", lambda m: m["adapters"][0].update(path="../../etc")),
        ("path-out-of-pack", lambda m: m.update(serving="/etc")),
        ("duplicate-name", lambda m: m["adapters"].append(m["adapters"][0])),
        ("bad-manifest", lambda m: m["adapters"][0].update(ranks=[])),
        ("bad-manifest", lambda m: m.pop("serve")),
        ("unknown-format", lambda m: m.update(format="lvnas-pack/9")),
        ("layout of the pack is 'heap'; expected one of pad", lambda m: m.update(layout="heap")),
        ("slots of the pack is 'x'; expected a whole number", lambda m: m.update(slots="x")),
        ("serve of the pack is .*pack again", lambda m: m.update(serve={"a": [1]})),
        ("groups of the pack is missing", lambda m: m.pop("groups")),
        ("groups of the pack is", lambda m: m["groups"][0]["adapters"].append("c")),
        ("scaling of a is {}; expected", lambda m: m["adapters"][0].update(scaling={})),
        (
            "scaling of a is",
            lambda m: m["adapters"][0].update(scaling={"convention": "per-module", "scale": {"b": 1.0}}),
        ),
        ("ranks of adapter 'a' is {'m': 'x'}", lambda m: m["adapters"][0].update(ranks={"m": "x"})),
        ("max_rank of adapter 'a' is True", lambda m: m["adapters"][0].update(max_rank=True)),
        ("task of adapter 'a' is 5", lambda m: m["adapters"][0].update(task=5)),
    ],
)
def test_a_manifest_that_cannot_be_trusted(
    reason: str, change: Callable[[dict[str, Any]], Any], tmp_path: Path
) -> None:
    packed = make_pack(tmp_path, "group")
    edit_manifest(packed, change)
    with pytest.raises(InputError, match=reason):
        verify(packed)


def test_a_router_configuration_that_was_edited(tmp_path: Path) -> None:
    packed = make_pack(tmp_path, "group")
    next(packed.glob("serving/*/litellm.yaml")).write_text("")
    assert "litellm.yaml: hash-mismatch" in verify(packed).problems[0]


def test_what_the_manifest_does_not_name_is_told(tmp_path: Path) -> None:
    packed = make_pack(tmp_path, "pad")
    old = folder_of(packed, "a")
    pack([read_adapter(make_adapter(tmp_path / "new" / "a", seed=9))], packed)
    verdict = verify(packed)
    assert verdict.problems == []
    assert verdict.unlisted == [f"adapters/{old.name}"]
