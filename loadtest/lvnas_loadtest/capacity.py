"""The most that a deployment carries: the highest rate within its SLOs, and the number of adapters that fit."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lvnas.errors import InputError
from lvnas.files import provenance, write_json
from lvnas_loadtest.run import run
from lvnas_loadtest.workload import Workload

GROWTH = 2.0
"""Factor between two tries before the first one that fails."""
SMALLEST = 40.0
"""A search gives up below the first value divided by this."""


def search(first: float, tolerance: float, works: Callable[[float], bool], highest: float) -> float:
    """The largest value that works, to a relative `tolerance`: grows from `first` until one fails (or `highest`
    works), then halves the interval. 0 where nothing works down to `first` / SMALLEST.
    """
    low, high, value = 0.0, math.inf, min(first, highest)
    while value >= first / SMALLEST:
        if works(value):
            low = value
        else:
            high = value
        if low >= highest or high - low <= tolerance * min(high, highest):
            break
        value = (low + high) / 2 if high < math.inf else min(low * GROWTH, highest)
    return low


def rate_capacity(
    workload: Workload,
    out: Path,
    *,
    share: float = 0.95,
    first: float = 1.0,
    highest: float = 1000.0,
    tolerance: float = 0.1,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """The highest Poisson rate at which `share` of all requests meet the workload's SLOs and none fails.

    Each try is a run of its own, kept below `out`; the result is also in `out/capacity.json`.

    Returns:
        {"rate": requests/s, "tries": [{"rate", "share", "failed", "output_throughput", "within"}], ...}

    Raises:
        InputError: no SLO; a share or rate out of range; the generator was the bottleneck.
    """
    if not workload.slo:
        raise InputError(
            "a capacity is the highest load within SLOs; give at least one, such as --goodput ttft:500"
        )
    if not (0 < share <= 1 and 0 < first <= highest and tolerance > 0):
        raise InputError(
            f"share {share}, first rate {first}, highest {highest}, tolerance {tolerance}: out of range"
        )
    tries: list[dict[str, Any]] = []

    def works(rate: float) -> bool:
        progress(f"{rate:.2f} requests/s")
        load = dataclasses.replace(workload, arrivals=f"poisson:{rate:.4f}")
        result = run(load, out / "runs" / f"{len(tries) + 1:02d}-rate-{rate:.2f}")
        if result["generator"]["saturated"]:
            raise InputError(
                f"the generator was the bottleneck: {'; '.join(result['generator']['saturated'])}"
            )
        good = result["goodput_share"] or 0.0
        within = good >= share and not result["failed"]
        kept = {name: result[name] for name in ("failed", "output_throughput", "p99_ttft_ms", "p99_tpot_ms")}
        tries.append({"rate": rate, "share": good, "within": within} | kept)
        return within

    capacity = {
        "rate": search(first, tolerance, works, highest),
        "slo": workload.slo,
        "share": share,
        "tries": tries,
        "workload": dataclasses.asdict(workload),
        "provenance": provenance(seed=workload.seed),
    }
    write_json(out / "capacity.json", capacity)
    return capacity
