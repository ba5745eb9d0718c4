"""How large the arena is: from a pack's manifest, a number of bytes, or as large as vLLM's padded buffers."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lvnas.errors import InputError
from lvnas.files import read_json
from lvnas.sizes import parse_bytes
from lvnas_vllm.ragged.arena import aligned
from lvnas_vllm.ragged.layout import Site, plan

MEMORY, PACK = "LVNAS_ADAPTER_MEMORY", "LVNAS_PACK"
RUNTIME = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"


@dataclass(frozen=True)
class Capacity:
    """The arena's size and where the number comes from."""

    elements: int
    source: str
    reserved: bool
    """Whether the memory is set aside at start; if not, the system gives it as adapters arrive (CPU only)."""


def manifest_sizes(
    pack: Path, sites: Sequence[Site], place: Callable[[str], tuple[int, int] | None]
) -> list[int]:
    """The arena elements of each adapter in the pack at folder or manifest `pack`, at these sites' shapes.

    `place` gives a module name's site and slice, None for a module that this process does not serve.

    Raises:
        InputError: no such pack, or a manifest without ranks.
    """
    path = pack / "manifest.json" if pack.is_dir() else pack
    manifest = read_json(path)
    adapters = manifest.get("adapters") if isinstance(manifest, Mapping) else None
    if not isinstance(adapters, list) or not all(isinstance(a, dict) and "ranks" in a for a in adapters):
        raise InputError(f"not a pack manifest: {path} (no adapters with ranks); make it with: lvnas pack")
    return [adapter_elements(adapter["ranks"], sites, place) for adapter in adapters]


def adapter_elements(
    ranks: Mapping[str, int], sites: Sequence[Site], place: Callable[[str], tuple[int, int] | None]
) -> int:
    """The arena elements of an adapter of `ranks` (module name -> rank)."""
    table = [[0] * site.slices for site in sites]
    for name, rank in ranks.items():
        spot = place(name)
        if spot is not None:
            table[spot[0]][spot[1]] = rank
    return aligned(plan(sites, table)[1])


def choose(
    sites: Sequence[Site],
    slots: int,
    element_bytes: int,
    padded: int,
    place: Callable[[str], tuple[int, int] | None],
) -> Capacity:
    """The capacity for `slots` resident adapters: $LVNAS_ADAPTER_MEMORY, $LVNAS_PACK's largest, or `padded`.

    A server that loads adapters at run time reserves the pack's largest adapter for every slot, so that any adapter of
    that size can take the place of any other.

    Raises:
        InputError: the memory asked for cannot hold the pack's `slots` largest adapters.
    """
    memory, pack = os.environ.get(MEMORY), os.environ.get(PACK)
    sizes = manifest_sizes(Path(pack), sites, place) if pack else []
    needed = sum(sorted(sizes)[-slots:])
    if memory:
        elements = parse_bytes(memory) // element_bytes
        if needed > elements:
            raise InputError(
                f"--adapter-memory ({MEMORY}) is {elements * element_bytes} bytes, but the "
                f"{min(slots, len(sizes))} largest adapters of {pack} need {needed * element_bytes}; "
                "raise it or lower --max-loras"
            )
        return Capacity(elements, f"{MEMORY}={memory}", True)
    if sizes and os.environ.get(RUNTIME, "").lower() in ("1", "true"):
        return Capacity(slots * max(sizes), f"the largest adapter of {pack} in every slot", True)
    if pack:
        return Capacity(needed, f"the manifest of {pack}", True)
    return Capacity(padded, f"vLLM's padded size; give {PACK} or {MEMORY} to reserve less", False)
