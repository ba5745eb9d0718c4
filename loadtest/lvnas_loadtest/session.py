"""A test's side that exists once: prepares the server, watches it during the load, gathers all processes'
records."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gevent

from lvnas.errors import InputError
from lvnas.files import write_json
from lvnas_loadtest.canary import Canary
from lvnas_loadtest.churn import Churn
from lvnas_loadtest.prompts import WORDS, chat_body
from lvnas_loadtest.records import Record, write_records
from lvnas_loadtest.sampler import Sampler
from lvnas_loadtest.server import check_models, served_models
from lvnas_loadtest.sse import connect, stream_chat
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
        self.failed = False
        """A worker could not begin."""

    def prepare(self, move: Callable[[str, str, str], None]) -> None:
        """What comes before the load: checks the models, measures the tokenizer, records the canary answers.

        Raises:
            InputError: a model is not served; churn without a pack.
        """
        check_models(self.workload)
        self.tokens_per_word = measure_tokens_per_word(self.workload)
        self.canary = Canary(self.workload) if self.workload.canary_every else None
        if self.canary:
            self.canary.record()
        self.churn = Churn(self.workload, move) if self.workload.churn else None
        urls = sorted({self.workload.route(adapter)[0] for adapter in self.workload.adapters})
        self.sampler = Sampler(urls, self.workload.server_pids)

    def begin(self) -> None:
        """The load starts now."""
        self.began = time.time()
        self.sampler.start()
        self.watchers = []
        if self.canary:
            self.watchers.append(
                gevent.spawn(self._every, self.workload.canary_every, self.canary.check_next)
            )
        if self.churn:
            self.watchers.append(gevent.spawn(self._every, self.workload.churn, self.churn.step))

    def collect(self, records: list[dict[str, Any]], generator: dict[str, float]) -> None:
        """Adds one process's records and what it says about itself."""
        self.records += [Record(**record) for record in records]
        self.generators.append(generator)

    def finish(self) -> None:
        """Stops watching, writes what was measured, gives replaced adapters their names back."""
        self.ended = time.time()
        self.sampler.stop()
        gevent.killall(self.watchers)
        self._write()
        if self.churn:
            self.churn.restore(time.time() - self.began)
            self._write()  # again, with what could not be restored

    def _write(self) -> None:
        if self.out is None:
            return
        write_records(self.out / "records.jsonl", sorted(self.records, key=lambda record: record.start))
        run: dict[str, Any] = {"began": self.began, "ended": self.ended, "generators": self.generators}
        run["workload"] = dataclasses.asdict(self.workload)
        run["tokens_per_word"] = self.tokens_per_word
        run["samples"] = {"values": self.sampler.samples, "errors": self.sampler.errors[:5]}
        run["canary"] = self.canary.report() if self.canary else None
        run["churn"] = self.churn.events if self.churn else None
        write_json(self.out / "run.json", run)

    def _every(self, interval: float, step: Callable[[float], None]) -> None:
        due = self.began
        while True:
            due += interval
            gevent.sleep(max(0.0, due - time.time()))
            step(time.time() - self.began)


def measure_tokens_per_word(workload: Workload) -> float:
    """How many of the server's tokens a word of our prompts has, from the counts it reports for a short
    and a long
    prompt; 1 where it reports none."""
    url, model = workload.route(workload.adapters[0])
    client, counts = connect(url, 1, workload.timeout), []
    for words in (8, 24):
        record = Record(adapter=model)
        content = [{"type": "text", "text": " ".join(WORDS[:words])}]
        stream_chat(client, chat_body(model, content, 1, ignore_eos=True), record)
        counts.append(record.prompt_tokens)
    client.close()
    return (counts[1] - counts[0]) / 16 if counts[1] > counts[0] > 0 else 1.0
