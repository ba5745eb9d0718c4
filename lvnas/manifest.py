"""A pack's manifest, read: every value's kind and every path in it checked, so that the rest can trust it."""

import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lvnas.errors import InputError
from lvnas.layouts import LAYOUTS
from lvnas.tensorfile import BrokenFile, check_regular_file, read_json_object, shorten

MANIFEST_NAME = "manifest.json"
MANIFEST_FORMAT = "lvnas-pack/1"
_ENTRY_PATH = re.compile(r"adapters/[A-Za-z0-9][A-Za-z0-9._-]{0,95}-[0-9a-f]{12}")
_SERVING_PATH = re.compile(r"serving/[0-9a-f]{12}")
_SETTINGS = {"max_loras", "max_lora_rank", "max_cpu_loras"}


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 1 << 48


def _is_number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and abs(value) <= sys.float_info.max


def _is_object_of(kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and bool(value) and all(map(kind, value.values()))


def _is_settings(value: Any) -> bool:
    return _is_object_of(_is_count)(value) and value.keys() == _SETTINGS


_Check = tuple[Callable[[Any], bool], str]
_MANIFEST: dict[str, _Check] = {
    "layout": (lambda value: value in LAYOUTS, f"one of {', '.join(LAYOUTS)}"),
    "base": (_is_text, "text"),
    "slots": (lambda value: value is None or _is_count(value), "a whole number >= 1, or null"),
    "serve": (_is_settings, f"counts {', '.join(sorted(_SETTINGS))}"),
}
_ENTRY: dict[str, _Check] = {
    **dict.fromkeys(("name", "path", "sha256", "dtype"), (_is_text, "text")),
    **dict.fromkeys(("max_rank", "bytes", "parameters"), (_is_count, "a whole number >= 1")),
    **dict.fromkeys(
        ("task", "vision_features", "pre_image_rows"),
        (lambda value: isinstance(value, str | None), "text or null"),
    ),
    "ranks": (_is_object_of(_is_count), "an object of module name: rank"),
    "files": (_is_object_of(_is_text), "an object of file name: SHA-256"),
    "truncation_errors": (
        lambda value: value is None or _is_object_of(_is_number)(value),
        "an object of module name: error",
    ),
}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of the pack in `folder`, its shape checked: enough to trust every path in it.

    Raises:
        InputError: no pack there.
        BrokenFile: a manifest that is malformed, of another version, or names paths outside the pack.
    """
    path = Path(folder) / MANIFEST_NAME
    if not path.exists():
        raise InputError(f"no pack in {str(folder)!r}: it has no {MANIFEST_NAME}; make one with lvnas pack")
    check_regular_file(path, Path(folder))
    manifest = read_json_object(path)
    if manifest.get("format") != MANIFEST_FORMAT:
        raise BrokenFile(
            path, "unknown-format", f"format {shorten(manifest.get('format'))}; expected {MANIFEST_FORMAT!r}"
        )
    entries = manifest.get("adapters")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise BrokenFile(path, "bad-manifest", "adapters must be a list of objects")
    _check_values(path, "the pack", manifest, _MANIFEST)
    for entry in entries:
        _check_values(path, f"adapter {shorten(entry.get('name'))}", entry, _ENTRY)
        if not _is_scaling(entry.get("scaling"), entry["ranks"]):
            raise _bad_value(path, entry["name"], "scaling", entry, '{"convention": text, "scale": numbers}')
        if not _ENTRY_PATH.fullmatch(entry["path"]):
            raise BrokenFile(
                path, "path-out-of-pack", f"{shorten(entry['path'])}; expected adapters/<name>-<hash>"
            )
    if "serving" in manifest and not _SERVING_PATH.fullmatch(str(manifest["serving"])):
        raise BrokenFile(path, "path-out-of-pack", f"{shorten(manifest['serving'])}; expected serving/<hash>")
    names = [entry["name"] for entry in entries]
    if len(set(names)) != len(names):
        raise BrokenFile(path, "duplicate-name", "two adapters have one name")
    if manifest["layout"] == "group" and not _are_groups(manifest.get("groups"), set(names)):
        raise _bad_value(path, "the pack", "groups", manifest, "a list of {name, adapters, serve}")
    return manifest


def _check_values(path: Path, whose: str, found: Mapping[str, Any], checks: Mapping[str, _Check]) -> None:
    for key, (is_right, expected) in checks.items():
        if not is_right(found.get(key)):
            raise _bad_value(path, whose, key, found, expected)


def _bad_value(path: Path, whose: str, key: str, found: Mapping[str, Any], expected: str) -> BrokenFile:
    value = shorten(found[key]) if key in found else "missing"
    return BrokenFile(
        path,
        "bad-manifest",
        f"{key} of {whose} is {value}; expected {expected}; remove the file and pack again",
    )


def _is_scaling(value: Any, modules: Mapping[str, Any]) -> bool:
    if not isinstance(value, dict) or not _is_text(value.get("convention")):
        return False
    scale = value.get("scale")
    if isinstance(scale, dict):
        return _is_object_of(_is_number)(scale) and scale.keys() == modules.keys()
    return _is_number(scale)


def _are_groups(value: Any, adapters: set[str]) -> bool:
    return isinstance(value, list) and all(
        isinstance(group, dict)
        and _is_text(group.get("name"))
        and isinstance(group.get("adapters"), list)
        and all(_is_text(name) and name in adapters for name in group["adapters"])
        and _is_settings(group.get("serve"))
        for group in value
    )
