"""Whether the generator itself was the bottleneck: then its times are its own, not the server's."""

import contextlib
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gevent
import numpy as np
import psutil

INTERVAL = 0.02
"""Seconds between two beats."""
PRIORITY = -10
MAX_CPU = 0.90
"""Share of one core above which a generator process counts as busy (Locust runs Python on one core)."""
MAX_LAG_MS = 20.0
"""99th percentile by which the generator may wake up late."""
MAX_SEND_LAG_MS = 100.0
"""99th percentile by which an open loop may send late."""


def go_first() -> None:
    """Puts this process before others on its machine, where that is allowed: a generator that shares a machine with
    the server needs little time, but at once, or its clock is wrong."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, PRIORITY)
        # Linux may share a processor out to sessions first: then priorities count only within a session.
        Path("/proc/self/autogroup").write_text(str(PRIORITY))


class Heartbeat:
    """Sleeps and measures by how much it wakes up late: what every timestamp of this process may be off
    by."""

    def start(self) -> None:
        self.lags: list[float] = []
        self._began, self._cpu = time.perf_counter(), _cpu_seconds()
        self._greenlet = gevent.spawn(self._beat)

    def stop(self) -> None:
        self._greenlet.kill()
        self._wall, self._cpu = time.perf_counter() - self._began, _cpu_seconds() - self._cpu

    def report(self) -> dict[str, float]:
        """CPU share of one core, and percentiles of the lateness in ms."""
        lags = self.lags or [0.0]
        p50, p99 = np.percentile(lags, [50, 99]) * 1000
        return {
            "cpu": self._cpu / self._wall,
            "lag_p50_ms": float(p50),
            "lag_p99_ms": float(p99),
            "lag_max_ms": max(lags) * 1000,
        }

    def _beat(self) -> None:
        while True:
            due = time.perf_counter() + INTERVAL
            gevent.sleep(INTERVAL)
            self.lags.append(max(0.0, time.perf_counter() - due))


def reasons(generators: Iterable[Mapping[str, Any]], send_lags: Sequence[float]) -> list[str]:
    """Why the generator's times cannot be trusted, one line each; empty where they can.

    Args:
        generators: what `Heartbeat.report` gave in each process.
        send_lags: seconds between an open loop's schedule and its sending.
    """
    found = []
    for number, process in enumerate(generators):
        if process["cpu"] > MAX_CPU:
            found.append(
                f"generator process {number} used {process['cpu']:.0%} of its core (limit {MAX_CPU:.0%})"
            )
        if process["lag_p99_ms"] > MAX_LAG_MS:
            late = process["lag_p99_ms"]
            found.append(
                f"generator process {number} woke up {late:.0f} ms late (p99; limit {MAX_LAG_MS:.0f} ms)"
            )
    late = float(np.percentile(send_lags, 99)) * 1000 if len(send_lags) else 0.0
    if late > MAX_SEND_LAG_MS:
        found.append(
            f"requests were sent {late:.0f} ms after their schedule (p99; limit {MAX_SEND_LAG_MS:.0f} ms)"
        )
    return found


def _cpu_seconds() -> float:
    times = psutil.Process().cpu_times()
    return times.user + times.system


def refusal(found: Sequence[str], folder: Path) -> str:
    """What is said instead of a report."""
    return (
        f"not reported, because the generator was the bottleneck: {'; '.join(found)}. Lower the load, use "
        "more generator processes (--locust '--processes 2') or another machine; --allow-saturated reports "
        f"all the same. Raw data: {folder}"
    )
