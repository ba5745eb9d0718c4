"""`lvnas pack`: PEFT adapters, from any trainer, to one verified folder that vLLM serves as PEFT would.

    manifest.json                 what is in the pack; replaced atomically
    adapters/<name>-<hash12>/     one PEFT adapter each; the hash covers all its files, it is never rewritten
    serving/<hash12>/             layout `group`: a serve script per engine, router configurations
    provenance.json               the last run: command, date, machine

Everything but provenance.json is the same, byte for byte, for the same input on every machine.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lvnas import __version__, files
from lvnas.adapter_config import CONFIG_NAME
from lvnas.adapters import METADATA_FORMAT, METADATA_NAME, WEIGHTS_NAME, Adapter
from lvnas.cards import CARD_NAME, model_card
from lvnas.errors import InputError
from lvnas.hub import HUB
from lvnas.manifest import MANIFEST_FORMAT
from lvnas.packfolder import PackFolder
from lvnas.prepare import PackOptions, Prepared, prepare
from lvnas.serving import check_names, groups, serve_settings, serving_files
from lvnas.tensorfile import Planned, write_tensors
from lvnas.values import dtype_name

SAVED_NAME = "modules_to_save.safetensors"
Progress = Callable[[int], None]


def pack(
    adapters: list[Adapter],
    out: Path,
    options: PackOptions | None = None,
    base: str | None = None,
    progress: Progress = lambda count: None,
) -> dict[str, Any]:
    """Packs `adapters` into the folder `out`, adding to what is there; returns the manifest.

    Interrupted at any moment, `out` is the old pack or the new one, and the same call again finishes it
    without repeating the adapters that were done. Several runs may pack into one folder at the same time.

    Args:
        adapters: as `read_adapter` gives them; one that the pack has under the same name is replaced.
        out: a new folder or a pack of the same layout and base.
        base: the base to serve them on; by default the one that all adapters name.
        progress: called with the number of bytes just written.

    Raises:
        InputError: adapters that do not fit together, a broken adapter, or a pack of another layout or base.
    """
    options = options or PackOptions()
    base = common_base(adapters, base)
    names = [adapter.name for adapter in adapters]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"two adapters are called {twice!r}; name one of them with NAME=FOLDER")
    check_names(names, base)
    check_initial_adapter(adapters, options)
    folder = PackFolder(out)
    folder.check(options.layout, base)
    entries = [_pack_one(adapter, folder, options, base, progress) for adapter in adapters]
    return folder.publish(lambda old: _manifest(old, entries, options, base), serving_files)


def common_base(adapters: list[Adapter], base: str | None) -> str:
    """The one base of all `adapters`; `base`, if given, must be theirs (by the last part of the names).

    Raises:
        InputError: none is known, or they differ.
    """
    if not adapters:
        raise InputError("no adapters to pack; give at least one folder or Hub id")
    wanted = base or next((adapter.base for adapter in adapters if adapter.base), None)
    if wanted is None:
        raise InputError(f"adapter {adapters[0].name!r} does not say what its base is; give it with --base")
    for adapter in adapters:
        if adapter.base and _last_part(adapter.base) != _last_part(wanted):
            raise InputError(
                f"adapter {adapter.name!r} was trained on {adapter.base!r}, not on {wanted!r}; "
                "one pack serves one base: pack it apart"
            )
    return wanted


def check_initial_adapter(adapters: list[Adapter], options: PackOptions) -> None:
    """Refuses an initial adapter that would not be used.

    Raises:
        InputError: one is given, and the training of none of `adapters` changed the base.
    """
    if options.initial_adapter is not None and not any(adapter.config.changed_base for adapter in adapters):
        raise InputError(
            f"initial adapter {str(options.initial_adapter)!r} has no use: init_lora_weights of none of the "
            "adapters (PiSSA, OLoRA, CorDA, LoRA-GA) changed the base; leave --initial-adapter out"
        )


def _last_part(base: str) -> str:
    return HUB.get(base, base).rstrip("/").rpartition("/")[2].lower()


def _pack_one(
    adapter: Adapter, folder: PackFolder, options: PackOptions, base: str, progress: Progress
) -> dict[str, Any]:
    """Writes one adapter's folder, or finds it already written, and returns its manifest entry."""
    with ThreadPoolExecutor(1) as pool:  # hashing releases the GIL: it runs beside the reading and writing
        source = pool.submit(_source_hashes, adapter, options)
        done = folder.finished(adapter.name)
        if done and (entry := done.get(_recipe(adapter, source.result(), options, base))):
            progress(entry["bytes"])
            return entry
        prepared = prepare(adapter, options, base)
        with folder.draft() as draft:
            digest = write_tensors(
                draft / WEIGHTS_NAME, prepared.layout.tensors(), _counted(prepared, progress)
            )
            if adapter.saved:
                _write_saved(adapter, draft / SAVED_NAME)
            entry = _entry(adapter, prepared, options) | {
                "sha256": digest,
                "bytes": (draft / WEIGHTS_NAME).stat().st_size,
                "provenance": {"lvnas": __version__, "options": options.recipe(), "source": source.result()},
            }
            _write_descriptions(
                draft, adapter, prepared, entry, _recipe(adapter, source.result(), options, base), base
            )
            return folder.keep(draft, entry)


def _counted(prepared: Prepared, progress: Progress) -> Iterator[memoryview]:
    for chunk in prepared.layout.data():
        yield chunk
        progress(chunk.nbytes)


def _entry(adapter: Adapter, prepared: Prepared, options: PackOptions) -> dict[str, Any]:
    """The manifest entry, but for what is known only when the weights are written."""
    layout = prepared.layout
    entry = {
        "name": adapter.name,
        "path": None,
        "sha256": None,
        "max_rank": layout.max_rank,
        "bytes": None,
        "parameters": sum(m.rank * (m.in_features + m.out_features) for m in layout.modules.values()),
        "ranks": {name: module.rank for name, module in layout.modules.items()},
        "scaling": layout.scaling(),
        "dtype": dtype_name(layout.dtype),
        "task": adapter.metadata.get("task"),
        "vision_features": adapter.metadata.get("vision_features"),
        "pre_image_rows": adapter.metadata.get("pre_image_rows"),
    }
    if prepared.errors:
        entry["truncation_errors"] = dict(prepared.errors)
    return entry


def _write_saved(adapter: Adapter, path: Path) -> None:
    """The adapter's `modules_to_save`, as they are."""
    planned = [Planned(tensor.name, tensor.dtype, tensor.shape) for tensor in adapter.saved.values()]
    write_tensors(path, planned, (tensor.read() for tensor in adapter.saved.values()))


def _write_descriptions(
    draft: Path, adapter: Adapter, prepared: Prepared, entry: dict[str, Any], recipe: str, base: str
) -> None:
    """adapter_config.json, lvnas.json and the model card."""
    config = prepared.layout.config(
        base_model_name_or_path=base,
        task_type=adapter.config.task_type,
        fan_in_fan_out=adapter.config.fan_in_fan_out,
    )
    files.write_json(draft / CONFIG_NAME, config)
    kept = {key: entry[key] for key in ("task", "vision_features", "pre_image_rows", "provenance")}
    metadata = {"format": METADATA_FORMAT, "base": base, **kept, "recipe": recipe, "entry": entry}
    files.write_json(draft / METADATA_NAME, metadata)
    files.write_text(draft / CARD_NAME, model_card(entry, base))


def _source_hashes(adapter: Adapter, options: PackOptions) -> dict[str, str]:
    found = {path.name: path for path in [*adapter.files, adapter.folder / METADATA_NAME]}
    if options.initial_adapter is not None and adapter.config.changed_base:
        found["initial/" + WEIGHTS_NAME] = options.initial_adapter / WEIGHTS_NAME
    return {name: files.sha256(path) for name, path in found.items() if path.exists()}


def _recipe(adapter: Adapter, source: dict[str, str], options: PackOptions, base: str) -> str:
    """What decides an adapter folder's bytes, as one hash."""
    recipe = {
        "lvnas": __version__,
        "name": adapter.name,
        "base": base,
        "source": source,
        "options": options.recipe(),
    }
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


def _manifest(
    old: dict[str, Any] | None, entries: list[dict[str, Any]], options: PackOptions, base: str
) -> dict[str, Any]:
    """The manifest `old` (None for a new pack) with `entries` added or replaced."""
    adapters = {entry["name"]: entry for entry in [*(old or {}).get("adapters", []), *entries]}
    listed = [adapters[name] for name in sorted(adapters)]
    slots = options.slots or (old or {}).get("slots")
    manifest = {
        "format": MANIFEST_FORMAT,
        "layout": options.layout,
        "base": base,
        "adapters": listed,
        "slots": slots,
        "serve": serve_settings(listed, slots),
        "provenance": {"lvnas": __version__},
    }
    if options.layout == "group":
        manifest["groups"] = groups(listed, slots)
    return manifest
