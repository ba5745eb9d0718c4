"""Safetensors files, read and written tensor by tensor, with every bound checked before it is used.

Format: 8 bytes little-endian header length, a JSON header {name: {"dtype", "shape", "data_offsets":
[begin, end]}}, then the data; offsets count from the header's end and cover the data without gap or overlap.
(https://github.com/huggingface/safetensors#format)
"""

import hashlib
import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lvnas.errors import InputError

MAX_HEADER = 16 << 20
"""Bytes. An adapter of 2,000 modules has a header below 1 MB; a huge one is an attack on the JSON parser."""
MAX_JSON = 16 << 20
_BATCH = 8 << 20
ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"), 1),
}
_NAME = re.compile(r"[A-Za-z0-9_]+(?:[.-][A-Za-z0-9_]+)*")


class BrokenFile(InputError):
    """A file that cannot be used: `<path>: <reason>: <detail>`; `reason` is a fixed name for the fault."""

    def __init__(self, path: Path, reason: str, detail: str) -> None:
        super().__init__(f"{path}: {reason}: {detail}")
        self.path, self.reason = Path(path), reason


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies."""

    path: Path
    name: str
    dtype: str
    """Safetensors' name of the element type, a key of ITEM_BYTES."""
    shape: tuple[int, ...]
    begin: int
    """Bytes from the start of the file."""
    nbytes: int

    def read(self) -> bytearray:
        """The tensor's bytes.

        Raises:
            BrokenFile: the file has become shorter since its header was read.
        """
        data = bytearray(self.nbytes)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.begin)
            view, done = memoryview(data), 0
            while done < self.nbytes:
                count = file.readinto(view[done:])
                if not count:
                    raise BrokenFile(self.path, "changed-while-read", f"it ends inside tensor {self.name!r}")
                done += count
        return data


def check_regular_file(path: Path, inside: Path) -> None:
    """Refuses anything but a regular file that, with links followed, lies in the folder `inside`.

    Raises:
        BrokenFile: missing, not a regular file, or a link that leaves the folder.
    """
    try:
        real = path.resolve(strict=True)
        mode = real.stat().st_mode
    except (OSError, RuntimeError, ValueError):
        raise BrokenFile(path, "missing-file", "no such file, or a dangling or circular link") from None
    if not real.is_relative_to(inside.resolve()):
        raise BrokenFile(
            path, "link-out-of-folder", f"it points to {real}; copy the file into the adapter's folder"
        )
    if not stat.S_ISREG(mode):
        raise BrokenFile(path, "not-a-file", "expected a regular file, not a folder, pipe or device")


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, of bounded size and depth and without duplicate keys.

    Raises:
        BrokenFile: anything else.
    """
    size = path.stat().st_size
    if size > MAX_JSON:
        raise BrokenFile(path, "json-too-large", f"{size} bytes; at most {MAX_JSON} are read")
    return parse_json_object(path, path.read_bytes())


def parse_json_object(path: Path, data: bytes) -> dict[str, Any]:
    """`data`, the JSON object that `path` holds; the errors of `read_json_object`."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) != len(items):
            twice, _ = Counter(name for name, _ in items).most_common(1)[0]
            raise BrokenFile(path, "duplicate-name", f"{shorten(twice)} is there twice")
        return found

    def constant(text: str) -> None:
        raise BrokenFile(path, "not-json", f"{text} is not a JSON number")

    try:
        value = json.loads(data.decode(), object_pairs_hook=pairs, parse_constant=constant)
    except RecursionError:
        raise BrokenFile(path, "json-too-deep", "brackets nested too deeply") from None
    except BrokenFile:
        raise
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, integers of thousands of digits
        raise BrokenFile(path, "not-json", str(error)) from None
    if not isinstance(value, dict):
        raise BrokenFile(path, "not-an-object", "expected a JSON object {...}")
    return value


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors of the safetensors file at `path`, in the order of their data, and its metadata.

    Raises:
        BrokenFile: any departure from the format.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        if size < 8:
            raise BrokenFile(path, "truncated", f"{size} bytes; a safetensors file has at least 8")
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER:
            kind = "it is not a safetensors file" if length >> 40 else f"at most {MAX_HEADER} are read"
            raise BrokenFile(path, "header-too-large", f"a header of {length} bytes is announced; {kind}")
        if 8 + length > size:
            raise BrokenFile(
                path, "truncated", f"a header of {length} bytes is announced, the file has {size}"
            )
        header = parse_json_object(path, file.read(length))
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise BrokenFile(path, "bad-metadata", "__metadata__ must map text to text")
    tensors = [_tensor(path, name, entry, 8 + length) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.begin, tensor.nbytes))
    end = 8 + length
    for tensor in tensors:
        if tensor.begin != end:
            reason = "overlapping-offsets" if tensor.begin < end else "gap-in-offsets"
            raise BrokenFile(path, reason, f"tensor {tensor.name!r} begins at {tensor.begin}, expected {end}")
        end += tensor.nbytes
    if end > size:
        raise BrokenFile(path, "truncated", f"its tensors need {end} bytes, the file has {size}")
    if end < size:
        raise BrokenFile(path, "trailing-bytes", f"{size - end} bytes after the last tensor")
    return {tensor.name: tensor for tensor in tensors}, metadata


def _tensor(path: Path, name: str, entry: Any, data_begin: int) -> TensorInfo:
    if len(name) > 512 or not _NAME.fullmatch(name):
        raise BrokenFile(
            path, "bad-tensor-name", f"{shorten(name)}; allowed: letters, digits, _ - and single dots"
        )
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise BrokenFile(
            path, "bad-tensor-entry", f"tensor {name!r} needs exactly dtype, shape and data_offsets"
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise BrokenFile(
            path, "unknown-dtype", f"tensor {name!r} has {shorten(dtype)}; known: {', '.join(ITEM_BYTES)}"
        )
    if not isinstance(shape, list) or len(shape) > 8 or not all(_is_count(size) for size in shape):
        raise BrokenFile(path, "bad-shape", f"tensor {name!r} has {shorten(shape)}; expected sizes >= 0")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(offset) for offset in offsets):
        raise BrokenFile(
            path, "bad-offsets", f"tensor {name!r} has {shorten(offsets)}; expected [begin, end]"
        )
    begin, end = offsets
    if end < begin:
        raise BrokenFile(path, "bad-offsets", f"tensor {name!r} ends at {end}, before it begins at {begin}")
    needed = math.prod(shape) * ITEM_BYTES[dtype]
    if end - begin != needed:
        raise BrokenFile(
            path, "size-mismatch", f"tensor {name!r}: {dtype} {shape} is {needed} bytes, not {end - begin}"
        )
    return TensorInfo(path, name, dtype, tuple(shape), data_begin + begin, needed)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 48


def shorten(value: Any) -> str:
    """`value` for an error message, at most 80 characters long."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


@dataclass(frozen=True, slots=True)
class Planned:
    """A tensor that is going to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def header_bytes(tensors: Iterable[Planned]) -> bytes:
    """The length and header of a file that holds `tensors` in this order; the same bytes on every machine."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for tensor in tensors:
        end = begin + tensor.nbytes
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_tensors(path: Path, tensors: list[Planned], data: Iterator[bytes | bytearray | memoryview]) -> str:
    """Writes a safetensors file in one pass and flushes it to the disk.

    Hashing and flushing release the GIL: they run beside the reading and writing.

    Args:
        path: a new file.
        tensors: what the header announces.
        data: the bytes of each tensor in turn; about three batches of 8 MiB, or one large tensor, are held at a time.

    Returns:
        The file's hex SHA-256.
    """
    header = header_bytes(tensors)
    digest = hashlib.sha256(header)
    with path.open("xb") as file, ThreadPoolExecutor(1) as hasher, ThreadPoolExecutor(1) as flusher:
        file.write(header)
        hashing = hasher.submit(_update, digest, [])
        flushing = flusher.submit(os.fdatasync, file.fileno())
        for batch in _batches(tensors, data):
            file.writelines(batch)
            hashing.result()
            hashing = hasher.submit(_update, digest, batch)
            if flushing.done():
                flushing.result()
                flushing = flusher.submit(os.fdatasync, file.fileno())
            if len(batch) == 1:  # perhaps a very large one: not two of those in memory
                hashing.result()
        flushing.result()
        file.flush()
        os.fsync(file.fileno())
        hashing.result()
    return digest.hexdigest()


def _batches(
    tensors: list[Planned], data: Iterator[bytes | bytearray | memoryview]
) -> Iterator[list[bytes | bytearray | memoryview]]:
    """`data` in pieces of about 8 MiB: handing each tensor to a thread would cost more than hashing it."""
    batch: list[bytes | bytearray | memoryview] = []
    size = 0
    for tensor, chunk in zip(tensors, data, strict=True):
        assert memoryview(chunk).nbytes == tensor.nbytes, tensor.name
        batch.append(chunk)
        size += tensor.nbytes
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    yield batch


def _update(digest: Any, batch: list[bytes | bytearray | memoryview]) -> None:
    for chunk in batch:
        digest.update(chunk)
