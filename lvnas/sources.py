"""Where adapters come from: folders, folders of folders, Hub ids, each with a name of the user's choice."""

import re
from collections.abc import Iterable
from pathlib import Path

from lvnas.adapter_config import CONFIG_NAME
from lvnas.adapters import Adapter, check_base, read_adapter
from lvnas.errors import InputError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}(@[\w./-]+)?")
_WANTED = [
    "adapter_config.json",
    "lvnas.json",
    "adapter_model*.safetensors",
    "adapter_model.safetensors.index.json",
]


def find_adapters(sources: Iterable[str]) -> list[Adapter]:
    """The checked adapters that `sources` name, in order.

    Args:
        sources: each an adapter's folder, a folder of such folders, a Hub id (`org/name[@revision]`), or
            NAME=one of these with a single adapter.

    Raises:
        InputError: a source that is nothing of this, or a broken adapter.
    """
    return [adapter for source in sources for adapter in _resolve(source)]


def _resolve(source: str) -> list[Adapter]:
    name, equals, place = source.rpartition("=") if not Path(source).exists() else ("", "", source)
    if not place:  # an empty path would be the current folder
        raise InputError(f"ADAPTER {source!r} names no place; give a folder, a Hub id or NAME=one of these")
    given = name if equals else None
    folder = Path(place)
    if folder.is_dir():
        if (folder / CONFIG_NAME).exists() or (folder / CONFIG_NAME).is_symlink():
            return [read_adapter(folder, given)]
        inside = sorted(path.parent for path in folder.glob(f"*/{CONFIG_NAME}"))
        if not inside:
            raise InputError(
                f"{place!r} holds no {CONFIG_NAME}, nor does a folder in it; expected a PEFT adapter"
            )
        if given and len(inside) > 1:
            raise InputError(f"{place!r} holds {len(inside)} adapters, which cannot all be called {given!r}")
        return [read_adapter(path, given) for path in inside]
    if _HUB_ID.fullmatch(place) and not folder.exists():
        return [read_adapter(download(place), given or place.partition("@")[0].rpartition("/")[2])]
    raise InputError(
        f"no adapter {place!r}; expected an adapter's folder, a folder of such folders, or a Hub id org/name"
    )


def download(hub_id: str, wanted: list[str] = _WANTED) -> Path:
    """The folder in the Hub's cache of `org/name[@revision]`, its files that match `wanted` fetched if need be.

    Raises:
        InputError: the Hub does not have it, refuses it, or cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, _, revision = hub_id.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"no folder {hub_id!r} here, and the Hub did not give it: {reason}") from None


def check_against_base(adapters: list[Adapter], base: str) -> list[str]:
    """Compares every module's name and size with those of `base`, if its configuration is on this machine.

    Returns:
        A note if it is not.

    Raises:
        BrokenFile: a module that the base does not have, or of another size.
    """
    from lvnas.bases import BASES
    from lvnas.bases.shapes import linear_shapes

    if base not in BASES and not Path(base).is_dir():
        return [f"base {base} is not on this machine: modules and sizes are not compared with it"]
    shapes = linear_shapes(base)
    for adapter in adapters:
        check_base(adapter, shapes, base)
    return []
