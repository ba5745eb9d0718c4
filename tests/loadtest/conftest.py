"""Starts scripted servers, each a process of its own."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Scripted:
    url: str
    pid: int
    log: Path

    def requests(self) -> list[dict]:
        """What the server saw, one dict per chat request or runtime load."""
        return [json.loads(line) for line in self.log.read_text().splitlines()]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[dict], Scripted]]:
    """`serve(script)` starts a scripted server; all are stopped at the end."""
    started: list[subprocess.Popen] = []

    def start(script: dict) -> Scripted:
        number = len(started)
        (tmp_path / f"script{number}.json").write_text(json.dumps(script))
        log = tmp_path / f"server{number}.jsonl"
        log.touch()
        program = str(Path(__file__).with_name("scripted_server.py"))
        command = [sys.executable, program, str(tmp_path / f"script{number}.json"), str(log)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        return Scripted(f"http://127.0.0.1:{int(process.stdout.readline())}", process.pid, log)

    yield start
    for process in started:
        process.terminate()
        process.wait()


@pytest.fixture
def priority() -> Iterator[None]:
    """Before the machine's other processes, where that is allowed: its lateness is no error of what is tested."""
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, -15)
    yield
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, usual)
