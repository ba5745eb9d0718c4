"""What is done to an adapter's modules before a layout writes them: conversion to plain LoRA, then truncation."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lvnas.adapters import Adapter, read_adapter
from lvnas.errors import InputError, unknown
from lvnas.layouts import LAYOUTS, LEGAL_RANKS, Layout
from lvnas.lora_modules import Factored
from lvnas.tensorfile import ITEM_BYTES, BrokenFile, header_bytes
from lvnas.values import DTYPE_NAMES

_CUTS = ("max_rank", "energy", "params", "target_bytes")


@dataclass(frozen=True, kw_only=True, slots=True)
class PackOptions:
    """What is done to the adapters on their way into a pack."""

    layout: str = "pad"
    dtype: str | None = None
    """float32, float16 or bfloat16; None keeps the adapter's own."""
    slots: int | None = None
    """max_loras of the serve command; None: 8, or fewer if there are fewer adapters."""
    max_rank: int | None = None
    """Cut every rank to at most this."""
    energy: float | None = None
    """Cut every rank to the lowest one that keeps this share of the squared singular values."""
    params: int | None = None
    """Cut the ranks of each adapter to this many parameters in all."""
    target_bytes: int | None = None
    """Cut the ranks of each adapter until its file is at most this large."""
    initial_adapter: Path | None = None
    """The adapter before training, to convert PiSSA, OLoRA, CorDA and LoRA-GA."""
    separate_saved: bool = False
    """Put whole trained modules (`modules_to_save`) into a file of their own instead of refusing them."""

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise unknown("layout", self.layout, LAYOUTS)
        if self.dtype is not None and self.dtype not in DTYPE_NAMES:
            raise unknown("dtype", self.dtype, DTYPE_NAMES)
        if self.slots is not None and self.slots < 1:
            raise InputError(f"slots {self.slots} must be at least 1")
        given = [name for name in _CUTS if getattr(self, name) is not None]
        if len(given) > 1:
            flags = " and ".join("--" + name.replace("_", "-") for name in given)
            raise InputError(f"{flags} both cut ranks; give one of them")

    def recipe(self) -> dict[str, Any]:
        """The options that are set and decide an adapter folder's bytes."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            k: v
            for k, v in values.items()
            if v not in (None, False) and k not in ("slots", "initial_adapter")
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """An adapter ready to be written."""

    layout: Layout
    errors: Mapping[str, float]
    """Module -> relative error of its update, for the modules whose rank was cut."""


def prepare(adapter: Adapter, options: PackOptions, base: str) -> Prepared:
    """Converts and truncates the modules of `adapter` as `options` say.

    Raises:
        BrokenFile: `modules_to_save` where they are not to be separated.
        InputError: a conversion that needs more than was given, or a target that cannot be met.
    """
    if adapter.saved and not options.separate_saved:
        name, tensor = next(iter(adapter.saved.items()))
        raise BrokenFile(
            tensor.path,
            "modules-to-save",
            f"it holds whole trained modules ({name}), which vLLM would drop; --separate-saved puts them into a "
            "file of their own and packs the LoRA alone",
        )
    dtype = DTYPE_NAMES[options.dtype] if options.dtype else adapter.dtype
    layout = Layout(options.layout != "ragged", _converted(adapter, options, base), dtype)
    if all(getattr(options, name) is None for name in _CUTS):
        return Prepared(layout=layout, errors={})
    return _cut(layout, options)


def _converted(adapter: Adapter, options: PackOptions, base: str) -> Mapping[str, Factored]:
    if adapter.config.changed_base is None:
        return adapter.modules
    from lvnas.base_weights import find_base_folder
    from lvnas.convert import RECOMPUTED, to_plain

    if options.initial_adapter is not None:
        return to_plain(adapter, read_adapter(options.initial_adapter, "initial"), None)
    try:
        folder = find_base_folder(base) if adapter.config.changed_base in RECOMPUTED else None
    except InputError:
        folder = None
    return to_plain(adapter, None, folder)


def _cut(layout: Layout, options: PackOptions) -> Prepared:
    from lvnas import truncate

    modules = layout.modules
    spectra = {name: truncate.singular_values(module) for name, module in modules.items()}
    widths = {name: module.in_features + module.out_features for name, module in modules.items()}
    if options.max_rank is not None:
        ranks = truncate.cut_to_rank(spectra, options.max_rank)
    elif options.energy is not None:
        ranks = truncate.cut_to_energy(spectra, options.energy)
    elif options.params is not None:
        ranks = truncate.cut_to_parameters(spectra, widths, options.params)
    else:
        assert options.target_bytes is not None
        ranks = _cut_to_bytes(layout, spectra, widths, options.target_bytes)
    cut = {
        name: truncate.Truncated(module, ranks[name]) if ranks[name] < module.rank else module
        for name, module in modules.items()
    }
    errors = {
        name: truncate.relative_error(spectra[name], ranks[name])
        for name, m in modules.items()
        if ranks[name] < m.rank
    }
    return Prepared(layout=Layout(layout.padded, cut, layout.dtype), errors=errors)


def _cut_to_bytes(
    layout: Layout, spectra: Mapping[str, list[float]], widths: Mapping[str, int], target: int
) -> dict[str, int]:
    """Ranks with which the file has at most `target` bytes; the header is counted at its longest."""
    from lvnas import truncate

    item, header = ITEM_BYTES[layout.dtype], len(header_bytes(layout.tensors())) + 64
    if not layout.padded:
        return truncate.cut_to_parameters(spectra, widths, (target - header) // item)
    fitting = [rank for rank in LEGAL_RANKS if header + rank * sum(widths.values()) * item <= target]
    if not fitting:
        least = header + sum(widths.values()) * item
        raise InputError(f"target of {target:,} bytes is too small: rank 1 everywhere takes {least:,}")
    return truncate.cut_to_rank(spectra, fitting[-1])
