"""The Locust user: takes the next request of its process's load and streams the answer."""

import time
from typing import ClassVar

import gevent
from locust import User, task
from locust.exception import StopUser

from lvnas_loadtest.load import Load
from lvnas_loadtest.records import Record


class RequestFailed(Exception):
    """What Locust shows for a failed request."""


class ChatUser(User):
    """In a closed loop, sends, waits for the answer, sends again. In an open loop, sends when the schedule
    says so and
    leaves the answer to another greenlet; any number of users share one schedule."""

    load: ClassVar[Load | None] = None
    """This process's load, set before the test starts; without one, users end at once."""

    @task
    def ask(self) -> None:
        """Sends the next request, or ends this user when there is none."""
        load = self.load
        planned = load.next() if load else None
        if load is None or planned is None:
            raise StopUser
        body = load.prompts.body(planned)
        if planned.at is None:
            load.send(planned, body, self.report)
        else:
            gevent.sleep(max(0.0, load.began + planned.at - time.time()))
            load.in_flight.spawn(load.send, planned, body, self.report)

    def wait_time(self) -> float:
        """No pause: the load decides when."""
        return 0.0

    def on_stop(self) -> None:
        """Stays until the answers under way are complete."""
        if self.load:
            self.load.in_flight.join()

    def report(self, record: Record) -> None:
        """Shows a request in Locust's own statistics (its response length is the number of output tokens)."""
        self.environment.events.request.fire(
            request_type="chat",
            name=record.adapter,
            response_time=record.latency * 1000,
            response_length=record.output_tokens,
            exception=RequestFailed(record.error) if record.error else None,
            start_time=record.start,
            url="/v1/chat/completions",
            context={},
        )
