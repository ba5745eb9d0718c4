"""A PEFT LoRA adapter's folder, read and checked without loading it: weights come one module at a time.

Every way in which a folder can be wrong is a `BrokenFile` with its own name; nothing is unpickled or run.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lvnas.adapter_config import CONFIG_NAME, AdapterConfig, read_config
from lvnas.errors import InputError
from lvnas.lora_modules import LoraModule, group_modules
from lvnas.tensorfile import (
    BrokenFile,
    TensorInfo,
    check_regular_file,
    read_header,
    read_json_object,
    shorten,
)

WEIGHTS_NAME = "adapter_model.safetensors"
INDEX_NAME = "adapter_model.safetensors.index.json"
METADATA_NAME = "lvnas.json"
METADATA_FORMAT = "lvnas-adapter/1"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


@dataclass(kw_only=True, slots=True)
class Adapter:
    """A checked adapter: its modules can be read, its values are checked when they are."""

    name: str
    folder: Path
    config: AdapterConfig
    modules: dict[str, LoraModule]
    files: list[Path]
    """Weight files, then adapter_config.json."""
    dtype: str
    """Narrowest element type that holds all its factors."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """lvnas.json, if there is one."""
    saved: dict[str, TensorInfo] = field(default_factory=dict)
    """Whole modules that were trained beside the LoRA (`modules_to_save`), by tensor name."""
    notes: list[str] = field(default_factory=list)

    @property
    def base(self) -> str | None:
        """The base that the adapter says it was trained on."""
        return self.metadata.get("base") or self.config.base

    @property
    def ranks(self) -> dict[str, int]:
        """Module -> rank."""
        return {name: module.rank for name, module in self.modules.items()}

    @property
    def parameters(self) -> int:
        """LoRA parameters: the sum of rank * (in + out)."""
        return sum(m.rank * (m.in_features + m.out_features) for m in self.modules.values())


def adapter_name(name: str) -> str:
    """`name` if it can be a model's name in a URL and a folder's name.

    Raises:
        InputError: it cannot.
    """
    if not _ADAPTER_NAME.fullmatch(name):
        raise InputError(
            f"adapter name {shorten(name)} is not usable; allowed: letters, digits, . _ - (at most 96, "
            "the first a letter or digit); give one with NAME=FOLDER"
        )
    return name


def read_adapter(folder: Path, name: str | None = None) -> Adapter:
    """The adapter in `folder`; reads its configuration and the headers of its weights, but no weights.

    Args:
        folder: PEFT's adapter folder; a snapshot in the Hub's cache may link to that cache's own blobs.
        name: how it shall be called; the folder's name by default.

    Raises:
        InputError: no such folder, or a name that cannot be used.
        BrokenFile: everything that can be wrong with its files.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(
            f"no adapter folder {str(folder)!r}; expected a folder with {CONFIG_NAME} and {WEIGHTS_NAME}"
        )
    name = adapter_name(name if name is not None else folder.resolve().name)
    inside = _allowed_root(folder)
    config = read_config(folder, inside)
    tensors, weight_files = _read_weights(folder, inside)
    modules, saved, notes = group_modules(config, weight_files[0], tensors)
    if saved and not config.modules_to_save:
        stray = next(iter(saved.values()))
        raise BrokenFile(stray.path, "not-lora-weights", f"tensor {stray.name!r} belongs to no LoRA module")
    dtypes = {tensor.dtype for module in modules.values() for tensor in (module.a, module.b)}
    return Adapter(
        name=name,
        folder=folder,
        config=config,
        modules=modules,
        files=[*weight_files, config.path],
        dtype=dtypes.pop() if len(dtypes) == 1 else "F32",
        metadata=read_metadata(folder),
        saved=saved,
        notes=[*config.notes, *notes],
    )


def check_base(adapter: Adapter, shapes: Mapping[str, tuple[int, int]], base: str) -> None:
    """Refuses an adapter whose modules are not the base's.

    Args:
        shapes: module name -> (in_features, out_features) of the base.
        base: the base's name, for the message.

    Raises:
        BrokenFile: a module that the base does not have, or of another size.
    """
    for name, module in adapter.modules.items():
        path = module.a.path
        if name not in shapes:
            raise BrokenFile(
                path, "not-in-base", f"{name} is no linear module of {base}; was it trained on another base?"
            )
        found = (module.in_features, module.out_features)
        if found != tuple(shapes[name]):
            raise BrokenFile(
                path, "shape-mismatch", f"{name} is for {found} inputs and outputs, {base} has {shapes[name]}"
            )


def _allowed_root(folder: Path) -> Path:
    """The folder itself; for a snapshot in the Hub's cache, that repository's part of the cache."""
    repository = folder.resolve().parent.parent
    is_snapshot = folder.resolve().parent.name == "snapshots" and (repository / "blobs").is_dir()
    return repository if is_snapshot else folder


def _read_weights(folder: Path, inside: Path) -> tuple[dict[str, TensorInfo], list[Path]]:
    whole, index = folder / WEIGHTS_NAME, folder / INDEX_NAME
    if whole.exists() or whole.is_symlink():
        check_regular_file(whole, inside)
        return read_header(whole)[0], [whole]
    if index.exists() or index.is_symlink():
        return _read_shards(folder, index, inside)
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    if pickles:
        raise BrokenFile(
            folder / pickles[0],
            "pickle",
            "pickled weights can run code and are not read; save the adapter as safetensors",
        )
    raise BrokenFile(whole, "missing-file", f"the folder has neither {WEIGHTS_NAME} nor {INDEX_NAME}")


def _read_shards(folder: Path, index: Path, inside: Path) -> tuple[dict[str, TensorInfo], list[Path]]:
    check_regular_file(index, inside)
    places = read_json_object(index).get("weight_map")
    if (
        not isinstance(places, dict)
        or not places
        or not all(isinstance(place, str) for place in places.values())
    ):
        raise BrokenFile(index, "bad-index", "weight_map must map tensor names to file names")
    tensors: dict[str, TensorInfo] = {}
    shards = sorted(set(places.values()))
    for shard in shards:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\.safetensors", shard):
            raise BrokenFile(
                index, "bad-shard-name", f"{shorten(shard)} must be the name of a .safetensors file beside it"
            )
        check_regular_file(folder / shard, inside)
        for name, tensor in read_header(folder / shard)[0].items():
            if name in tensors:
                raise BrokenFile(
                    folder / shard, "duplicate-name", f"tensor {name!r} is also in {tensors[name].path.name}"
                )
            if places.get(name) != shard:
                raise BrokenFile(
                    index, "index-mismatch", f"tensor {name!r} is in {shard}, which the index does not say"
                )
            tensors[name] = tensor
    if missing := sorted(set(places) - set(tensors)):
        raise BrokenFile(
            index, "index-mismatch", f"tensor {shorten(missing[0])} is not in {places[missing[0]]}"
        )
    return tensors, [folder / shard for shard in shards]


def read_metadata(folder: Path) -> dict[str, Any]:
    """lvnas.json of an adapter's folder; empty if there is none.

    Raises:
        BrokenFile: it is of another format, or holds values of another kind.
    """
    path = Path(folder) / METADATA_NAME
    if not path.exists() and not path.is_symlink():
        return {}
    check_regular_file(path, _allowed_root(Path(folder)))
    metadata = read_json_object(path)
    if metadata.get("format") != METADATA_FORMAT:
        raise BrokenFile(
            path, "unknown-format", f"format {shorten(metadata.get('format'))}; expected {METADATA_FORMAT!r}"
        )
    for key, allowed in {
        "vision_features": ("reference", "transformers", None),
        "pre_image_rows": ("reference", "transformers", None),
    }.items():
        if metadata.get(key) not in allowed:
            raise BrokenFile(
                path, "bad-option", f"{key} is {shorten(metadata[key])}; allowed: reference, transformers"
            )
    for key in ("task", "base"):
        if not isinstance(metadata.get(key), str | None):
            raise BrokenFile(path, "bad-option", f"{key} is {shorten(metadata[key])}, not text")
    for key in ("provenance", "finetune"):
        if not isinstance(metadata.get(key, {}), dict):
            raise BrokenFile(path, "bad-option", f"{key} is {shorten(metadata[key])}, not an object")
    return metadata
