"""What happened to one request, and files of them."""

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from lvnas.files import write_text


@dataclass(kw_only=True, slots=True)
class Record:
    """One request; times in seconds, `start` since the epoch, the others since `start`."""

    adapter: str
    index: int = -1
    image: bool = False
    cold: bool = False
    """The adapter was not among the last `slots` different ones when the request was sent."""
    scheduled: float | None = None
    """When an open loop wanted it sent, since the epoch."""
    start: float = 0.0
    ttft: float | None = None
    """To the first chunk that carries a token."""
    itl: list[float] = field(default_factory=list)
    """Gaps between the chunks that carry tokens."""
    latency: float = 0.0
    """To the last token; to the failure, where there was one."""
    prompt_tokens: int = 0
    output_tokens: int = 0
    counted: bool = False
    """The server reported the two counts; else output_tokens is the number of chunks."""
    text: str = ""
    finish_reason: str | None = None
    error: str | None = None

    @property
    def tpot(self) -> float | None:
        """Mean time per output token after the first; None with fewer than two."""
        if self.ttft is None or self.output_tokens < 2:
            return None
        return (self.latency - self.ttft) / (self.output_tokens - 1)


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Writes one JSON object a line."""
    write_text(path, "".join(json.dumps(dataclasses.asdict(record)) + "\n" for record in records))


def read_records(path: Path) -> list[Record]:
    """The records of a file that `write_records` wrote."""
    return [Record(**json.loads(line)) for line in path.read_text().splitlines()]
