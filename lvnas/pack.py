"""`lvnas pack`: PEFT adapters, from any trainer, to one verified folder that vLLM serves as PEFT would.

    manifest.json                 what is in the pack; replaced atomically
    adapters/<name>-<hash12>/     one PEFT adapter each; the hash covers all its files, it is never rewritten
    serving/<hash12>/             layout `group`: a serve script per engine, router configurations
    provenance.json               the last run: command, date, machine

Everything but provenance.json is the same, byte for byte, for the same input on every machine.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lvnas import __version__, files
from lvnas.adapter_config import CONFIG_NAME
from lvnas.adapters import METADATA_FORMAT, METADATA_NAME, WEIGHTS_NAME, Adapter
from lvnas.cards import CARD_NAME, model_card
from lvnas.errors import InputError, unknown
from lvnas.layouts import LAYOUTS, Layout
from lvnas.lora_modules import Factored
from lvnas.packfolder import MANIFEST_FORMAT, PackFolder
from lvnas.serving import groups, serve_settings, serving_files
from lvnas.tensorfile import write_tensors
from lvnas.values import DTYPE_NAMES, dtype_name

Progress = Callable[[int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class PackOptions:
    """What is done to the adapters on their way into a pack."""

    layout: str = "pad"
    dtype: str | None = None
    """float32, float16 or bfloat16; None keeps the adapter's own."""
    slots: int | None = None
    """max_loras of the serve command; None: 8, or fewer if there are fewer adapters."""

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise unknown("layout", self.layout, LAYOUTS)
        if self.dtype is not None and self.dtype not in DTYPE_NAMES:
            raise unknown("dtype", self.dtype, DTYPE_NAMES)
        if self.slots is not None and self.slots < 1:
            raise InputError(f"slots {self.slots} must be at least 1")


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


def _last_part(base: str) -> str:
    return base.rstrip("/").rpartition("/")[2].lower()


def _pack_one(
    adapter: Adapter, folder: PackFolder, options: PackOptions, base: str, progress: Progress
) -> dict[str, Any]:
    """Writes one adapter's folder, or finds it already written, and returns its manifest entry."""
    settings = {key: value for key, value in asdict(options).items() if key not in ("slots",)}
    with ThreadPoolExecutor(1) as pool:  # hashing releases the GIL: it runs beside the reading and writing
        source = pool.submit(_source_hashes, adapter)
        done = folder.finished(adapter.name)
        if done and (entry := done.get(_recipe(adapter, source.result(), settings, base))):
            progress(entry["bytes"])
            return entry
        modules: Mapping[str, Factored] = adapter.modules
        layout = Layout(
            options.layout != "ragged", modules, DTYPE_NAMES.get(options.dtype or "", adapter.dtype)
        )
        with folder.draft() as draft:
            tensors = layout.tensors()

            def counted() -> Any:
                for chunk in layout.data():
                    yield chunk
                    progress(len(chunk))

            digest = write_tensors(draft / WEIGHTS_NAME, tensors, counted())
            config = layout.config(
                base_model_name_or_path=base,
                task_type=adapter.config.task_type,
                fan_in_fan_out=adapter.config.fan_in_fan_out,
            )
            files.write_json(draft / CONFIG_NAME, config)
            entry = {
                "name": adapter.name,
                "path": None,
                "sha256": digest,
                "max_rank": layout.max_rank,
                "bytes": (draft / WEIGHTS_NAME).stat().st_size,
                "parameters": sum(m.rank * (m.in_features + m.out_features) for m in modules.values()),
                "ranks": {name: module.rank for name, module in modules.items()},
                "scaling": layout.scaling(),
                "dtype": dtype_name(layout.dtype),
                "task": adapter.metadata.get("task"),
                "vision_features": adapter.metadata.get("vision_features"),
                "pre_image_rows": adapter.metadata.get("pre_image_rows"),
                "provenance": {"lvnas": __version__, "options": settings, "source": source.result()},
            }
            files.write_text(draft / CARD_NAME, model_card(entry, base))
            files.write_json(draft / METADATA_NAME, {
                "format": METADATA_FORMAT,
                "base": base,
                "recipe": _recipe(adapter, source.result(), settings, base),
                "entry": entry,
                **{key: entry[key] for key in ("task", "vision_features", "pre_image_rows", "provenance")},
            })  # fmt: skip
            return folder.keep(draft, entry)


def _source_hashes(adapter: Adapter) -> dict[str, str]:
    found = [*adapter.files, adapter.folder / METADATA_NAME]
    return {path.name: files.sha256(path) for path in found if path.exists()}


def _recipe(adapter: Adapter, source: dict[str, str], settings: dict[str, Any], base: str) -> str:
    """What decides an adapter folder's bytes, as one hash."""
    recipe = {"lvnas": __version__, "name": adapter.name, "base": base, "source": source, "options": settings}
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
