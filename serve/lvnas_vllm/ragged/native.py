"""The native CPU operator: compiled on first use with the system's compiler, cached; absent without one.

`LVNAS_NATIVE=0` switches it off. Everything then runs through `torch_ops`, with the same results.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("native.cpp")
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-ffp-contract=fast")
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
POINTER, LONG, INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


@dataclass(frozen=True)
class Native:
    """Whether the native operator can run, and why not."""

    function: ctypes._CFuncPtr | None
    reason: str
    """What runs, in words for `lvnas doctor`."""


def cache_folder() -> Path:
    """Where compiled operators are kept: $LVNAS_CACHE or ~/.cache/lvnas."""
    return Path(os.environ.get("LVNAS_CACHE") or Path.home() / ".cache" / "lvnas") / "native"


@functools.cache
def load() -> Native:
    """The operator, compiling it if no compiled one fits this source, compiler and processor."""
    if os.environ.get("LVNAS_NATIVE", "1") == "0":
        return Native(None, "pure torch: LVNAS_NATIVE=0")
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++", "c++")), None)
    if compiler is None:
        return Native(None, "pure torch: no C++ compiler (g++, clang++ or CXX) at hand")
    try:
        library = ctypes.CDLL(str(compiled(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        detail = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        return Native(None, f"pure torch: {compiler} failed: {detail[0] if detail else error}")
    function = library.lvnas_ragged
    function.restype = None
    function.argtypes = [
        *(INT, POINTER, LONG, POINTER, LONG, POINTER, POINTER, LONG, LONG, LONG),
        *(POINTER, POINTER, POINTER, POINTER, LONG, INT),
    ]
    return Native(function, f"native: {compiler}, {platform.machine()}")


def compiled(compiler: str) -> Path:
    """The shared library for `compiler` on this processor, compiled when it is not in the cache."""
    arch = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    identity = [SOURCE.read_text(), compiler, *FLAGS, arch, version(compiler), processor()]
    target = cache_folder() / f"ragged-{hashlib.sha256(chr(0).join(identity).encode()).hexdigest()[:16]}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, draft = tempfile.mkstemp(suffix=".so", dir=target.parent)
        os.close(handle)
        try:
            command = [compiler, *FLAGS, arch, "-o", draft, str(SOURCE)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
            os.replace(draft, target)
        finally:
            Path(draft).unlink(missing_ok=True)
    return target


def version(compiler: str) -> str:
    """The compiler's own version line."""
    return subprocess.run(
        [compiler, "--version"], check=True, capture_output=True, text=True, timeout=60
    ).stdout


def processor() -> str:
    """What tells processors apart: a cached library must not meet one without its instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
