"""What a load test takes from a pack's manifest: the adapters, their rank classes, the slots, the folders."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lvnas.errors import InputError
from lvnas.files import read_json


@dataclass(frozen=True, slots=True)
class Pack:
    """A pack as a load test sees it."""

    adapters: list[str]
    rank_classes: dict[str, str]
    """Adapter -> `rank 64` where every module has the same rank, else `mixed <= 64`."""
    slots: int | None
    """The server's --max-loras."""
    paths: dict[str, str]
    """Adapter -> its folder."""


def read_pack(folder: Path) -> Pack:
    """Reads `manifest.json`.

    Raises:
        InputError: no pack there.
    """
    manifest = read_json(folder / "manifest.json")
    try:
        entries = {entry["name"]: entry for entry in manifest["adapters"]}
        return Pack(
            adapters=list(entries),
            rank_classes={name: rank_class(entry["ranks"].values()) for name, entry in entries.items()},
            slots=manifest.get("serve", {}).get("max_loras"),
            paths={name: str((folder / entry["path"]).resolve()) for name, entry in entries.items()},
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{folder / 'manifest.json'} is no pack's manifest ({error!r}); make one: lvnas pack"
        ) from None


def rank_class(ranks: Iterable[int]) -> str:
    """`rank 64` for one rank throughout, `mixed <= 64` otherwise; modules of rank 0 have no adapter and do
    not count."""
    found = {rank for rank in ranks if rank}
    if not found:
        return "rank 0"
    return f"rank {max(found)}" if len(found) == 1 else f"mixed <= {max(found)}"
