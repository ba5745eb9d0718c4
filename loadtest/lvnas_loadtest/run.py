"""Runs one load test: Locust in a process of its own, then the report."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lvnas_loadtest
from lvnas.errors import InputError
from lvnas.files import atomic_folder, refuse_foreign
from lvnas_loadtest import report
from lvnas_loadtest.plan import Plan
from lvnas_loadtest.server import check_models
from lvnas_loadtest.workload import Workload

LOCUSTFILE = Path(lvnas_loadtest.__file__).with_name("locustfile.py")


def run(
    workload: Workload,
    out: Path,
    locust_options: Sequence[str] = (),
    progress: Callable[[float], None] = lambda seconds: None,
) -> dict[str, Any]:
    """Sends `workload` and writes its report to the folder `out`; an older report there is replaced.

    Args:
        locust_options: more options for Locust (`--processes 4`, `--web-port 8089`).
        progress: called every half second with the seconds since the start.

    Returns:
        The result (see `results.analyse`).

    Raises:
        InputError: `out` holds something else; a bad trace; a model is not served; Locust broke off (the
            message is its first error, or its last word).
    """
    refuse_foreign(out, "run.json", others=True)
    Plan(workload)  # reads the trace, which Locust's processes would complain about too late
    check_models(workload)
    with atomic_folder(out) as draft:
        workload.write(draft / "workload.json")
        log = draft / "locust.log"
        command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--host", workload.url]
        command += [
            "--workload",
            str(draft / "workload.json"),
            "--out",
            str(draft),
            "--exit-code-on-error",
            "0",
        ]
        users = workload.users if not workload.open_loop else 1
        command += ["--users", str(users), "--spawn-rate", str(users), *locust_options]
        if not any(option.startswith("--web") for option in locust_options):
            command += ["--headless", "--only-summary"]
        with log.open("w") as file:
            locust = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=_environment())
            try:
                _wait(locust, progress)
            finally:
                if locust.poll() is None:
                    locust.terminate()
                    locust.wait()
        if locust.returncode or not (draft / "run.json").exists():
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            words = [line for line in lines if "ERROR" in line] or lines[-1:] or ["no reason given"]
            raise InputError(
                f"the load test did not finish (Locust exit code {locust.returncode}): {words[0][-400:]}"
            )
        return report.write(draft)


def _wait(process: subprocess.Popen[bytes], progress: Callable[[float], None]) -> None:
    began = time.monotonic()
    while True:
        try:
            process.wait(0.5)
            return
        except subprocess.TimeoutExpired:
            progress(time.monotonic() - began)


def _environment() -> dict[str, str]:
    """Ours without LOCUST_* options, which would change the run unseen."""
    return {name: value for name, value in os.environ.items() if not name.startswith("LOCUST_")}
