"""One Locust process's share of a load test: what it still has to send, and what came of it."""

import time
from collections import OrderedDict
from collections.abc import Callable

from gevent.pool import Group

from lvnas_loadtest.plan import Plan, Planned
from lvnas_loadtest.prompts import Prompts
from lvnas_loadtest.records import Record
from lvnas_loadtest.saturation import Heartbeat
from lvnas_loadtest.sse import connect, stream_chat
from lvnas_loadtest.workload import Workload

OPEN_LOOP_CONNECTIONS = 4096


class Load:
    """Sends the plan of shard `shard` of `shards`; its users take requests from it one by one."""

    def __init__(
        self, workload: Workload, shard: int = 0, shards: int = 1, tokens_per_word: float = 1.0
    ) -> None:
        self.workload = workload
        self.plan = Plan(workload, shard, shards)
        self.prompts = Prompts(self.plan)
        self.prompts.tokens_per_word = tokens_per_word
        concurrency = OPEN_LOOP_CONNECTIONS if workload.open_loop else workload.users
        urls = {workload.route(adapter)[0] for adapter in workload.adapters}
        self.clients = {url: connect(url, concurrency, workload.timeout) for url in urls}
        self.records: list[Record] = []
        self.in_flight = Group()
        self.recent: dict[str, OrderedDict[str, None]] = {url: OrderedDict() for url in urls}
        self.heartbeat = Heartbeat()
        self.began = 0.0
        self._queue = iter(self.plan)

    def begin(self) -> None:
        """Starts the clock that the plan's times count from."""
        self.began = time.time()
        self.heartbeat.start()

    def end(self) -> None:
        """Stops the clock and closes the connections."""
        self.heartbeat.stop()
        for client in self.clients.values():
            client.close()

    def next(self) -> Planned | None:
        """The next request to send; None when there is no more, or a closed loop's time is up."""
        timed = not self.workload.open_loop and self.workload.requests is None
        if timed and time.time() >= self.began + self.plan.end:
            return None
        return next(self._queue, None)

    def send(self, planned: Planned, body: bytes, report: Callable[[Record], None]) -> None:
        """Sends one request, waits for its last token and keeps its record."""
        url, model = self.workload.route(planned.adapter)
        record = Record(adapter=planned.adapter, index=planned.index, image=planned.image_side is not None)
        record.scheduled = None if planned.at is None else self.began + planned.at
        record.cold = self._touch(url, model)
        stream_chat(self.clients[url], body, record)
        self.records.append(record)
        report(record)

    def _touch(self, url: str, model: str) -> bool:
        """Marks `model` as just used on `url`; whether it had fallen out of the server's slots (a cold
        request)."""
        recent = self.recent[url]
        cold = model not in recent
        recent[model] = None
        recent.move_to_end(model)
        while self.workload.slots is not None and len(recent) > self.workload.slots:
            recent.popitem(last=False)
        return cold
