"""`lvnas verify`: a pack checked against its manifest: every hash, shape and value."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lvnas.adapters import Adapter, read_adapter
from lvnas.errors import InputError
from lvnas.layouts import legal_rank
from lvnas.lora_modules import LoraModule
from lvnas.manifest import read_manifest
from lvnas.packfolder import folder_hash, hash_files
from lvnas.serving import groups, serve_settings, serving_files
from lvnas.tensorfile import check_regular_file


@dataclass(kw_only=True, slots=True)
class Verdict:
    """What was found in a pack."""

    adapters: int = 0
    bytes: int = 0
    """Of the weights that were read."""
    problems: list[str] = field(default_factory=list)
    """One line each; a pack without any is what `lvnas pack` wrote."""
    unlisted: list[str] = field(default_factory=list)
    """Folders that the manifest does not name: replaced adapters, or what an interrupted run left. Harmless."""


def verify(folder: Path, progress: Callable[[int], None] = lambda count: None) -> Verdict:
    """Reads all of the pack in `folder` and compares it with its manifest.

    Args:
        progress: called with the number of weight bytes just checked.

    Raises:
        InputError: no pack there, or a manifest that cannot be read at all.
    """
    manifest = read_manifest(folder)
    verdict = Verdict()
    for entry in manifest["adapters"]:
        try:
            verdict.problems += _entry_problems(folder, manifest, entry)
        except InputError as error:
            verdict.problems.append(str(error))
        verdict.adapters += 1
        verdict.bytes += entry["bytes"]
        progress(entry["bytes"])
    verdict.problems += _serving_problems(folder, manifest)
    listed = {entry["path"] for entry in manifest["adapters"]} | {manifest.get("serving")}
    present = {
        f"{kind}/{path.name}" for kind in ("adapters", "serving") for path in (folder / kind).glob("*")
    }
    verdict.unlisted = sorted(present - listed)
    return verdict


def _entry_problems(folder: Path, manifest: Mapping[str, Any], entry: Mapping[str, Any]) -> Iterator[str]:
    place = folder / entry["path"]
    for name in entry["files"]:
        check_regular_file(place / name, place)
    hashes = hash_files(place)
    for name in sorted(hashes.keys() | entry["files"].keys()):
        if hashes.get(name) != entry["files"].get(name):
            kind = "is not the file that was packed" if name in entry["files"] else "was not packed"
            yield f"{place / name}: hash-mismatch: {kind}"
    if place.name != f"{entry['name']}-{folder_hash(hashes)}":
        yield f"{place}: hash-mismatch: its name is not the hash of its files"
    if entry["sha256"] != hashes.get("adapter_model.safetensors"):
        yield f"{place}: hash-mismatch: sha256 in the manifest is not that of adapter_model.safetensors"
    adapter = read_adapter(place, entry["name"])
    for what, said, found in (
        ("base", manifest["base"], adapter.base),
        ("modules", sorted(entry["ranks"]), sorted(adapter.modules)),
        ("bytes", entry["bytes"], (place / "adapter_model.safetensors").stat().st_size),
        ("max_rank", entry["max_rank"], legal_rank(max(adapter.ranks.values()))),
    ):
        if said != found:
            yield f"{place}: manifest-mismatch: {what} is {found}, the manifest says {said}"
            return
    yield from _value_problems(place, adapter, entry, padded=manifest["layout"] != "ragged")


def _value_problems(place: Path, adapter: Adapter, entry: Mapping[str, Any], padded: bool) -> Iterator[str]:
    """Ranks, scales and every value; reading the factors refuses what is not finite."""
    parameters = 0
    for name, module in adapter.modules.items():
        rank = entry["ranks"][name]
        parameters += rank * (module.in_features + module.out_features)
        scales = entry["scaling"]["scale"]
        scale = scales[name] if isinstance(scales, dict) else scales
        if abs(module.scale - scale) > 1e-6 * abs(scale):
            yield f"{place}: manifest-mismatch: {name} has scale {module.scale}, the manifest says {scale}"
        if module.rank != (entry["max_rank"] if padded else rank):
            yield f"{place}: manifest-mismatch: {name} has rank {module.rank}, the manifest says {rank}"
        elif not _zero_beyond(module, rank):
            yield f"{place}: not-zero: {name} has values beyond its rank {rank}"
    if parameters != entry["parameters"]:
        yield f"{place}: manifest-mismatch: {parameters} parameters, the manifest says {entry['parameters']}"


def _zero_beyond(module: LoraModule, rank: int) -> bool:
    a_RD, b_OR = module.factors()
    return not a_RD[rank:].any() and not b_OR[:, rank:].any()


def _serving_problems(folder: Path, manifest: Mapping[str, Any]) -> Iterator[str]:
    entries, slots = manifest["adapters"], manifest.get("slots")
    if entries and manifest["serve"] != serve_settings(entries, slots):
        yield f"{folder}: manifest-mismatch: serve is not what the adapters need"
    if manifest["layout"] != "group":
        return
    if manifest.get("groups") != groups(entries, slots):
        yield f"{folder}: manifest-mismatch: groups are not those of the adapters' ranks"
        return
    place = folder / str(manifest.get("serving"))
    for name, text in serving_files(dict(manifest)).items():
        file = place / name
        if not file.is_file() or file.read_bytes() != text.encode():
            yield f"{file}: hash-mismatch: not the file that was written with the manifest"
