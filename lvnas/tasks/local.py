"""A user's own task: a .jsonl or .parquet file in The Cauldron's schema."""

import base64
import io
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from lvnas.errors import InputError
from lvnas.tasks.task import Task, limited, split_by_image

SCHEMA = '{"images": [path, data URI or {"bytes"}], "texts": [{"user", "assistant"}]}'
IMAGE = "<|image|>"
"""The chat template's token of an image; processors count it in the text."""
_UNREADABLE = (OSError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError)
"""What Pillow raises for an image that is broken or far too large."""


def local_task(path: Path, sizes: dict[str, int] | None = None) -> Task:
    """The rows of `path`, split by image; images are paths beside the file, data URIs, or embedded bytes.

    Raises:
        InputError: no such file, or a row that does not fit the schema; the message names the row.
    """
    if not path.is_file():
        raise InputError(f"no such file: {path}")
    source = _jsonl(path) if path.suffix == ".jsonl" else _parquet(path)
    rows = [_row(row, path, number) for number, row in enumerate(source, 1)]
    splits = split_by_image(rows)
    empty = [name for name, examples in splits.items() if not examples]
    if empty:
        raise InputError(
            f"{path} has too few images: the split {empty[0]} is empty; give at least some dozens"
        )
    return Task(str(path), limited(splits, sizes), "exact")


def _jsonl(path: Path) -> Iterator[Any]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: JSON's text may hold U+2028
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:  # also integers of thousands of digits
                raise InputError(f"{path}, line {number}: not JSON ({error})") from None


def _parquet(path: Path) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(64):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{path} is no parquet file that can be read: {error}") from None


def _row(row: Any, path: Path, number: int) -> dict[str, Any]:
    try:
        images = [_image(image, path.parent) for image in row["images"]]
        texts = [{"user": str(t["user"]), "assistant": str(t["assistant"])} for t in row["texts"]]
        if not images:
            raise ValueError("no image; every row needs one")
        if any(IMAGE in text for pair in texts for text in pair.values()):
            raise ValueError(
                f"a text holds {IMAGE}, which stands for an image: take it out, images come first"
            )
    except (*_UNREADABLE, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}, row {number}: {type(error).__name__}: {error}; expected {SCHEMA}"
        ) from None
    return {"images": images, "texts": [text | {"source": path.stem} for text in texts]}


def _image(value: Any, folder: Path) -> Image.Image:
    if isinstance(value, dict) and value.get("bytes"):
        return Image.open(io.BytesIO(value["bytes"])).convert("RGB")
    place = value["path"] if isinstance(value, dict) else value
    if not isinstance(place, str):
        raise TypeError(f"image {place!r}")
    if place.startswith("data:"):
        return Image.open(io.BytesIO(base64.b64decode(place.partition(",")[2], validate=True))).convert("RGB")
    return Image.open(folder / place).convert("RGB")
