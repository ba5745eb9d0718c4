"""Starts the servers of a deployment with `lvnas serve`'s own plan, and stops them."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lvnas.errors import InputError
from lvnas_loadtest.deployments import Deployment, Engine
from lvnas_loadtest.server import served_models

START_TIMEOUT = 1800.0
STOP_TIMEOUT = 60.0


@dataclass(frozen=True, slots=True)
class Running:
    """A deployment that answers."""

    routes: dict[str, list[str]]
    """Name in the load -> [url, model]."""
    pids: list[int]
    start_seconds: float


@contextlib.contextmanager
def running(deployment: Deployment, flags: Sequence[str], logs: Path) -> Iterator[Running]:
    """Starts all engines of `deployment`, with vLLM's `flags`, waits until they answer, and stops them at the end.

    Raises:
        InputError: an engine ended before it answered; the message has its last words.
    """
    if threading.current_thread() is threading.main_thread():
        # So that a terminated comparison stops its servers too, as an interrupted one does.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    began = time.monotonic()
    routes: dict[str, list[str]] = {}
    with contextlib.ExitStack() as stack:
        started = []
        for number, engine in enumerate(deployment.engines):
            if engine.url is None:
                url, base, process = stack.enter_context(
                    _process(engine, flags, logs / f"server{number}.log")
                )
                started.append((url, process, logs / f"server{number}.log"))
            else:
                url, base = engine.url, ""
            routes |= {label: [url, model or base] for label, model in engine.models.items()}
        for url, process, log in started:
            _wait(url, process, log)
        yield Running(routes, [process.pid for _, process, _ in started], time.monotonic() - began)


@contextlib.contextmanager
def _process(
    engine: Engine, flags: Sequence[str], log: Path
) -> Iterator[tuple[str, str, subprocess.Popen[bytes]]]:
    """(url, base model, process) of one engine; the process and its children are gone afterwards."""
    from lvnas.serve import ServeOptions, plan

    port = free_port()
    options = ServeOptions(base=engine.base, group=engine.group, flags=[*flags, "--port", str(port)])
    launch = plan(engine.sources, options)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("LVNAS_RAGGED")}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        process = subprocess.Popen(
            launch.argv,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=inherited | launch.env,
            start_new_session=True,
        )
    try:
        yield f"http://127.0.0.1:{port}", launch.base, process
    finally:
        _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ends the process, and whatever of its session outlives it."""
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Waits until `url` lists its models."""
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise InputError(
                f"the server ended before it answered (exit code {process.returncode}): {_words(log)}"
            )
        with contextlib.suppress(InputError):
            served_models(url)
            return
        time.sleep(1.0)
    raise InputError(f"the server did not answer within {START_TIMEOUT:.0f} s: {_words(log)}")


def _words(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()
    errors = [line for line in lines if "Error" in line] or lines[-1:]
    return f"{errors[-1][-300:] if errors else 'it said nothing'} (whole log: {log})"


def free_port() -> int:
    """A port of the loopback address that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
