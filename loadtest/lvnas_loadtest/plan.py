"""The requests of a workload, by number: the same for the same seed, however they are timed or shared out."""

import csv
import itertools
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lvnas.errors import InputError, unknown
from lvnas_loadtest import arrivals
from lvnas_loadtest.distributions import distribution
from lvnas_loadtest.popularity import popularity
from lvnas_loadtest.workload import Workload


@dataclass(frozen=True, slots=True)
class Planned:
    """One request before it is sent; `at` is seconds from the start (None in a closed loop)."""

    index: int
    at: float | None
    adapter: str
    prompt_tokens: int
    output_tokens: int
    image_side: int | None


class Plan:
    """The requests of `workload` that worker `shard` of `shards` sends.

    Raises:
        InputError: a bad trace (see `read_trace`), or one that names adapters which are not the workload's.
    """

    def __init__(self, workload: Workload, shard: int = 0, shards: int = 1) -> None:
        self.workload, self.shard, self.shards = workload, shard, shards
        self.choose = popularity(workload.popularity, workload.adapters)
        self.prompt_tokens = distribution("prompt length", workload.prompt_tokens)
        self.output_tokens = distribution("output length", workload.output_tokens)
        self.image_side = distribution("image size", workload.image_size)
        self.end = workload.warmup + workload.duration
        kind, _ = arrivals.form(workload.arrivals)
        self.trace = read_trace(Path(workload.arrivals.removeprefix("trace:"))) if kind == "trace" else []
        if workload.popularity == "trace":
            for row in self.trace:
                if row.get("model", workload.adapters[0]) not in workload.adapters:
                    raise unknown("adapter in the trace", row["model"], workload.adapters)

    def request(self, index: int, at: float | None = None) -> Planned:
        """Request number `index`; a trace's row fills what it records."""
        workload = self.workload
        rng = random.Random(f"{workload.seed}/{index}")
        adapter = self.choose(index, rng)
        prompt, output = self.prompt_tokens(rng), self.output_tokens(rng)
        side = self.image_side(rng) if rng.random() < workload.image_share else None
        if self.trace:
            row = self.trace[index]
            prompt, output = row.get("prompt_tokens", prompt), row.get("output_tokens", output)
            if workload.popularity == "trace" and "model" in row:
                adapter = row["model"]
        return Planned(index, at, adapter, prompt, output, side)

    def __iter__(self) -> Iterator[Planned]:
        """This shard's requests in order; a closed loop's have no end (its users stop with the clock)."""
        mine = itertools.count(self.shard, self.shards)
        limit = self.workload.requests
        if self.workload.open_loop:
            yield from (
                self.request(index, at) for index, at in self._arrivals() if index % self.shards == self.shard
            )
        else:
            yield from (
                self.request(i) for i in itertools.takewhile(lambda i: limit is None or i < limit, mine)
            )

    def _arrivals(self) -> Iterator[tuple[int, float]]:
        if self.trace:
            offsets: Iterator[float] = (row["timestamp"] - self.trace[0]["timestamp"] for row in self.trace)
        else:
            offsets = arrivals.times(self.workload.arrivals, self.end, self.workload.seed)
        numbered = enumerate(offsets)
        if self.workload.requests is not None:
            return itertools.islice(numbered, self.workload.requests)
        return itertools.takewhile(lambda pair: pair[1] < self.end, numbered)


def read_trace(path: Path) -> list[dict[str, Any]]:
    """The rows of a recorded trace, `.jsonl` or `.csv`: `timestamp` in seconds, and optionally `model`,
    `prompt_tokens`, `output_tokens`; sorted by time.

    Raises:
        InputError: no such file, a row without a time, a value that is not a number.
    """
    try:
        with path.open(newline="") as file:
            rows = (
                list(csv.DictReader(file))
                if path.suffix == ".csv"
                else [json.loads(line) for line in file if line.strip()]
            )
        trace = [_row(row) for row in rows]
    except OSError as error:
        raise InputError(f"cannot read the trace {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"bad trace {path}: {error!r}; each row needs a timestamp in seconds") from None
    if not trace:
        raise InputError(f"the trace {path} is empty")
    return sorted(trace, key=lambda row: row["timestamp"])


def _row(row: Mapping[str, Any]) -> dict[str, Any]:
    read: dict[str, Any] = {"timestamp": float(row["timestamp"])}
    read |= {name: max(1, int(row[name])) for name in ("prompt_tokens", "output_tokens") if row.get(name)}
    return read | ({"model": str(row["model"])} if row.get("model") else {})
