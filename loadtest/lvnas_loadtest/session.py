"""A test's side that exists once: finds the adapters, starts the clocks, gathers all processes' records."""

import dataclasses
import time
from pathlib import Path
from typing import Any

from lvnas.errors import InputError
from lvnas.files import write_json
from lvnas_loadtest.records import Record, write_records
from lvnas_loadtest.server import served_models
from lvnas_loadtest.workload import Workload


class Session:
    """One run from the test's start to its end."""

    def __init__(self, workload_file: str, out: str, host: str | None, users: int | None) -> None:
        if workload_file:
            self.workload = Workload.read(Path(workload_file))
        elif host:
            self.workload = Workload(url=host, adapters=served_models(host), users=users or 1)
        else:
            raise InputError("no server: give --host URL or --workload FILE")
        self.out = Path(out) if out else None
        self.tokens_per_word = 1.0
        self.records: list[Record] = []
        self.generators: list[dict[str, float]] = []

    def prepare(self) -> None:
        """What takes time before the load: checks that the server has the models."""
        for adapter in self.workload.adapters:
            url, model = self.workload.route(adapter)
            if model not in served_models(url):
                raise InputError(
                    f"{url} serves no model {model!r}; it serves {', '.join(served_models(url))}"
                )

    def begin(self) -> None:
        """The load starts now."""
        self.began = time.time()

    def collect(self, records: list[dict[str, Any]], generator: dict[str, float]) -> None:
        """Adds one process's records and what it says about itself."""
        self.records += [Record(**record) for record in records]
        self.generators.append(generator)

    def finish(self) -> None:
        """Writes what was measured."""
        if self.out is None:
            return
        write_records(self.out / "records.jsonl", sorted(self.records, key=lambda record: record.start))
        run = {"began": self.began, "ended": time.time(), "generators": self.generators}
        write_json(self.out / "run.json", run | {"workload": dataclasses.asdict(self.workload)})
