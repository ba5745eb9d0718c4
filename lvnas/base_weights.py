"""A base checkpoint's weights on disk, found by module name."""

from pathlib import Path

from lvnas.errors import InputError
from lvnas.modules import canonical_name
from lvnas.tensorfile import TensorInfo, read_header, read_json_object


def shard_files(folder: Path) -> list[Path]:
    """The safetensors files of the checkpoint in `folder`.

    Raises:
        InputError: it has none.
    """
    index = folder / "model.safetensors.index.json"
    if index.exists():
        places = read_json_object(index).get("weight_map", {})
        return [folder / Path(str(name)).name for name in sorted(set(places.values()))]
    found = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))
    if not found:
        raise InputError(f"base folder {folder} has no .safetensors weights")
    return found


def base_weights(folder: Path) -> dict[str, TensorInfo]:
    """Module name (transformers >= 5) -> its weight."""
    tensors = {name: info for path in shard_files(folder) for name, info in read_header(path)[0].items()}
    return {
        canonical_name(name).removesuffix(".weight"): info
        for name, info in tensors.items()
        if name.endswith(".weight")
    }


def find_base_folder(base: str) -> Path:
    """The folder with the weights of `base`: short name, Hub id (from the cache, or downloaded) or folder.

    Raises:
        InputError: unknown, or not to be had.
    """
    from lvnas.bases import resolve
    from lvnas.sources import download

    place = resolve(base)
    return (
        Path(place)
        if Path(place).is_dir()
        else download(place, ["*.safetensors", "*.json", "*.jinja", "*.model"])
    )
