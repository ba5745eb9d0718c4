"""Numbers from records, with the names and definitions of `vllm bench serve` (vllm/benchmarks/serve.py):
TTFT to the first token, TPOT the mean gap after it, ITL each gap, E2EL to the last token; `duration` from
the first counted request's start to the last one's end; throughputs over that duration; failed requests in
no percentile.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lvnas_loadtest.records import Record

PERCENTILES = (50, 90, 95, 99)
METRICS = ("ttft", "tpot", "itl", "e2el")


def summary(records: Sequence[Record], duration: float, slo: Mapping[str, float]) -> dict[str, Any]:
    """Counts, throughputs, goodput and latency percentiles of `records`.

    Args:
        records: finished requests, failed ones included.
        duration: seconds that the throughputs divide by.
        slo: limits in ms for ttft, tpot and e2el; a request is good when it meets all of them.

    Returns:
        `vllm bench serve`'s result fields; `None` for a percentile without a sample, and for the goodput
        without SLOs.
    """
    done = [record for record in records if record.error is None]
    prompt = sum(record.prompt_tokens for record in done)
    output = sum(record.output_tokens for record in done)
    good = sum(is_good(record, slo) for record in done)
    seconds = max(duration, 1e-9)
    result: dict[str, Any] = {
        "duration": duration,
        "completed": len(done),
        "failed": len(records) - len(done),
        "total_input_tokens": prompt,
        "total_output_tokens": output,
        "request_throughput": len(done) / seconds,
        "request_goodput": good / seconds if slo else None,
        "goodput_share": good / len(records) if slo and records else None,
        "output_throughput": output / seconds,
        "total_token_throughput": (prompt + output) / seconds,
    }
    for name, values in samples(done).items():
        result |= latency(name, values)
    return result


def samples(done: Iterable[Record]) -> dict[str, list[float]]:
    """The measured times in seconds per metric; a request of one token has no TPOT."""
    found: dict[str, list[float]] = {name: [] for name in METRICS}
    for record in done:
        assert record.ttft is not None
        found["ttft"].append(record.ttft)
        found["itl"] += record.itl
        found["e2el"].append(record.latency)
        if record.tpot is not None:
            found["tpot"].append(record.tpot)
    return found


def latency(name: str, values: Sequence[float]) -> dict[str, float | None]:
    """mean, median, std and percentiles of `values` (seconds) in ms, named as in `vllm bench serve`."""
    if not values:
        names = ["mean", "median", "std", *(f"p{p}" for p in PERCENTILES)]
        return {f"{stat}_{name}_ms": None for stat in names}
    ms = np.asarray(values) * 1000
    found = {"mean": ms.mean(), "median": np.median(ms), "std": ms.std()}
    found |= {f"p{p}": np.percentile(ms, p) for p in PERCENTILES}
    return {f"{stat}_{name}_ms": float(value) for stat, value in found.items()}


def is_good(record: Record, slo: Mapping[str, float]) -> bool:
    """Whether a finished request meets all of `slo` (ms); one token alone meets any TPOT."""
    assert record.ttft is not None
    times = {"ttft": record.ttft, "tpot": record.tpot or 0.0, "e2el": record.latency}
    return all(times[name] * 1000 <= limit for name, limit in slo.items())


def span(records: Sequence[Record]) -> float:
    """Seconds from the first start to the last end."""
    if not records:
        return 0.0
    return max(record.start + record.latency for record in records) - min(record.start for record in records)


def grouped(records: Iterable[Record], key: Callable[[Record], str]) -> dict[str, list[Record]]:
    """The records by `key`, in the order of its first appearance."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        groups[key(record)].append(record)
    return dict(groups)


def peaks(done: Sequence[Record]) -> dict[str, float]:
    """The most tokens in one second, and the most requests under way in one (counted as `vllm bench serve`
    does)."""
    if not done:
        return {"max_output_tokens_per_s": 0.0, "max_concurrent_requests": 0}
    first = min(record.start for record in done)
    size = int(span(done)) + 2
    tokens, running = np.zeros(size), np.zeros(size)
    for record in done:
        assert record.ttft is not None
        begin = record.start - first
        np.add.at(tokens, (begin + record.ttft + np.cumsum([0.0, *record.itl])).astype(int), 1)
        running[int(begin) : int(begin + record.latency) + 1] += 1
    return {"max_output_tokens_per_s": float(tokens.max()), "max_concurrent_requests": int(running.max())}
