"""A pack's folder on disk: adapter folders named by their content, one manifest, both replaced atomically.

Safe against kill -9 (a draft is locked by its writer; the next run removes drafts that nobody holds) and
against concurrent runs (the manifest is merged under a lock).
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lvnas import files
from lvnas.adapters import METADATA_NAME, WEIGHTS_NAME
from lvnas.errors import InputError
from lvnas.manifest import MANIFEST_NAME, read_manifest
from lvnas.tensorfile import read_json_object

PROVENANCE_NAME = "provenance.json"


def folder_hash(hashes: Mapping[str, str]) -> str:
    """The 12 hex digits in a folder's name: SHA-256 over the names and SHA-256 of all its files."""
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(hashes.items()))
    return hashlib.sha256(lines.encode()).hexdigest()[:12]


def hash_files(folder: Path) -> dict[str, str]:
    """File name -> SHA-256 for every file in `folder`."""
    return {path.name: files.sha256(path) for path in sorted(folder.iterdir())}


class PackFolder:
    """The pack at `root`, being written; other runs may be writing it too."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self.adapters = self.root / "adapters"

    def manifest(self) -> dict[str, Any] | None:
        """The manifest, or None while there is no pack yet."""
        return read_manifest(self.root) if (self.root / MANIFEST_NAME).exists() else None

    def check(self, layout: str, base: str) -> None:
        """Refuses to add to a pack of another layout or base, or to a folder that holds something else.

        Raises:
            InputError: it is not what `layout` and `base` need.
        """
        if self.root.is_file():
            raise InputError(f"{self.root} is a file; name a folder for the pack with --out")
        manifest = self.manifest()
        if manifest is None:
            present = {path.name for path in self.root.iterdir()} if self.root.is_dir() else set()
            # A kill may leave these without a manifest.
            ours = {"adapters", "serving", ".lock", PROVENANCE_NAME, *(path.name for path in self._drafts())}
            foreign = present - ours
            if foreign:
                raise InputError(
                    f"{self.root} holds other files ({min(foreign)}); name a new folder with --out"
                )
            return
        for key, wanted in (("layout", layout), ("base", base)):
            if manifest[key] != wanted:
                raise InputError(
                    f"{self.root} is a pack of {key} {manifest[key]!r}, not {wanted!r}; use another --out"
                )

    def finished(self, name: str) -> dict[str, dict[str, Any]]:
        """Recipe -> manifest entry, for every folder of adapter `name` that is whole."""
        found = {}
        for path in sorted(self.adapters.glob(f"{name}-????????????")):
            hashes = hash_files(path)
            if METADATA_NAME in hashes and path.name == f"{name}-{folder_hash(hashes)}":
                metadata = read_json_object(path / METADATA_NAME)
                found[metadata["recipe"]] = _complete(metadata["entry"], hashes)
        return found

    @contextlib.contextmanager
    def draft(self) -> Iterator[Path]:
        """A new folder to write an adapter into; removed at the end unless `keep` has taken it."""
        with self._locked():
            self.adapters.mkdir(exist_ok=True)
            self._remove_abandoned()
            path = Path(tempfile.mkdtemp(prefix=".draft-", dir=self.adapters))
            held = os.open(path, os.O_RDONLY)
            fcntl.flock(held, fcntl.LOCK_EX)
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)
            os.close(held)

    def keep(self, draft: Path, entry: dict[str, Any]) -> dict[str, Any]:
        """Gives a finished draft its lasting name and returns its manifest entry."""
        hashes = hash_files_but(draft, entry["sha256"])
        entry = _complete(entry, hashes)
        target = self.root / entry["path"]
        draft.chmod(0o755)
        try:
            os.rename(draft, target)
        except OSError:
            if not target.is_dir():
                raise
            if (
                hash_files(target) != hashes
            ):  # same content, same name: only damage on the disk makes them differ
                raise InputError(
                    f"{target} is damaged (lvnas verify tells more); remove it and pack again"
                ) from None
        _flush_folder(self.adapters)
        return entry

    def publish(
        self,
        merge: Callable[[dict[str, Any] | None], dict[str, Any]],
        serving: Callable[[dict[str, Any]], dict[str, str]],
    ) -> dict[str, Any]:
        """Replaces the manifest by `merge(old)`, the files of `serving(manifest)` first; returns it."""
        with self._locked():
            manifest = merge(self.manifest())
            if texts := serving(manifest):
                hashes = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
                manifest["serving"] = f"serving/{folder_hash(hashes)}"
                target = self.root / manifest["serving"]
                if not target.exists():
                    with files.atomic_folder(target) as draft:
                        for name, text in texts.items():
                            files.write_text(draft / name, text)
            for abandoned in self._drafts():
                abandoned.unlink(missing_ok=True)
            files.write_json(self.root / PROVENANCE_NAME, files.provenance())
            files.write_json(self.root / MANIFEST_NAME, manifest)
        return manifest

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _drafts(self) -> list[Path]:
        """Drafts of the two files of the root; who holds the lock may remove them, nobody else writes any."""
        names = (PROVENANCE_NAME, MANIFEST_NAME)
        return [path for name in names for path in self.root.glob(f".{name}.*") if path.is_file()]

    def _remove_abandoned(self) -> None:
        """Removes drafts whose writer is gone: the system releases a dead process's lock."""
        for path in self.adapters.glob(".draft-*"):
            with contextlib.suppress(OSError):
                held = os.open(path, os.O_RDONLY)
                try:
                    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path, ignore_errors=True)
                finally:
                    os.close(held)


def hash_files_but(folder: Path, weights: str) -> dict[str, str]:
    """As `hash_files`, for a folder whose weights' hash `weights` is known from writing them."""
    return {p.name: weights if p.name == WEIGHTS_NAME else files.sha256(p) for p in sorted(folder.iterdir())}


def _complete(entry: dict[str, Any], hashes: Mapping[str, str]) -> dict[str, Any]:
    return entry | {"path": f"adapters/{entry['name']}-{folder_hash(hashes)}", "files": dict(hashes)}


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
