"""The locustfile: `python -m locust -f .../locustfile.py --host URL [--workload FILE] [--out DIR]`.

Works with Locust's web UI, headless, with `--processes N` and with `--master` / `--worker`; a worker gets its
workload from the master.
"""

# Locust patches the standard library's sockets when it is imported, so it comes before all that opens any.
import locust  # isort: skip
import dataclasses
import logging
from functools import partial
from typing import Any

import gevent
from locust import LoadTestShape, events, runners

from lvnas.errors import InputError
from lvnas_loadtest.load import Load
from lvnas_loadtest.saturation import go_first
from lvnas_loadtest.session import Session
from lvnas_loadtest.users import ChatUser
from lvnas_loadtest.workload import Workload

__all__ = ["ChatUser", "Shape"]

BEGIN, MOVE, FINISH, RECORDS = "lvnas-begin", "lvnas-move", "lvnas-finish", "lvnas-records"
FAILED = "lvnas-failed"
SETTLE = 3.0
"""Seconds in which a master may not have heard yet from its workers how many users they run."""
COLLECT = 30.0
"""Seconds that a master waits at the end for its workers' records."""
session: Session | None = None


@events.init_command_line_parser.add_listener
def add_options(parser: Any) -> None:
    """Adds ours to Locust's options."""
    parser.add_argument(
        "--workload", default="", help="lvnas workload file (JSON); without it, a default one"
    )
    parser.add_argument(
        "--out", default="", help="folder for the report; without it, only Locust's own numbers"
    )


@events.init.add_listener
def initialise(environment: Any, **_: Any) -> None:
    """Registers the messages between a master and its workers."""
    runner = environment.runner
    if isinstance(runner, runners.WorkerRunner):
        runner.register_message(BEGIN, worker_begin)
        runner.register_message(MOVE, worker_move)
        runner.register_message(FINISH, worker_finish)
    if isinstance(runner, runners.MasterRunner):
        runner.register_message(RECORDS, master_collect)
        runner.register_message(FAILED, master_failed)


def worker_begin(environment: Any, msg: Any) -> None:
    """On a worker: takes its share of the workload; where it cannot, the master is told to end the test."""
    ChatUser.load = None
    try:
        ChatUser.load = Load(Workload(**msg.data["workload"]), *msg.data["share"])
    except InputError as error:
        environment.runner.send_message(FAILED, str(error))


def move(runner: Any, adapter: str, url: str, model: str) -> None:
    """Sends an adapter's requests elsewhere from now on, in all processes."""
    assert session is not None
    session.workload.routes[adapter] = [url, model]
    if isinstance(runner, runners.MasterRunner):
        runner.send_message(MOVE, {"adapter": adapter, "route": [url, model]})


def worker_move(environment: Any, msg: Any) -> None:
    """On a worker: an adapter's requests go elsewhere from now on."""
    if ChatUser.load:
        ChatUser.load.workload.routes[msg.data["adapter"]] = msg.data["route"]


def worker_finish(environment: Any, msg: Any) -> None:
    """On a worker: hands its records to the master."""
    if ChatUser.load:
        environment.runner.send_message(RECORDS, finish_load(ChatUser.load))


def finish_load(load: Load) -> dict[str, Any]:
    """Ends this process's load; what came of it, in plain types."""
    load.end()
    records = [dataclasses.asdict(record) for record in load.records]
    return {"records": records, "generator": load.heartbeat.report()}


def master_collect(environment: Any, msg: Any) -> None:
    """On the master: takes a worker's records."""
    assert session is not None
    session.collect(**msg.data)


def master_failed(environment: Any, msg: Any) -> None:
    """On the master: lets the shape end the test, since a worker has nothing to send."""
    assert session is not None
    session.failed = True
    logging.error("%s", msg.data)
    environment.process_exit_code = 2


@events.test_start.add_listener
def begin(environment: Any, **_: Any) -> None:
    """Prepares the run, and hands each worker its share before its users start."""
    global session
    runner, options = environment.runner, environment.parsed_options
    if not isinstance(runner, runners.WorkerRunner):
        ChatUser.load = None
        try:
            session = Session(options.workload, options.out, environment.host, options.num_users)
            session.prepare(partial(move, runner))
            if not isinstance(runner, runners.MasterRunner):
                ChatUser.load = Load(session.workload, tokens_per_word=session.tokens_per_word)
        except InputError as error:
            session = None  # nothing to write at the end
            logging.error("%s", error)
            environment.process_exit_code = 2
            raise locust.exception.StopTest from None
    if isinstance(runner, runners.MasterRunner):
        assert session is not None
        for shard, client in enumerate(runner.clients):
            share = (shard, len(runner.clients), session.tokens_per_word)
            runner.send_message(
                BEGIN, {"workload": dataclasses.asdict(session.workload), "share": share}, client
            )
    if session is not None:
        session.begin()
    if ChatUser.load:
        go_first()
        ChatUser.load.begin()


@events.test_stopping.add_listener
def gather(environment: Any, **_: Any) -> None:
    """On the master, before it stops its workers: gets their records."""
    runner = environment.runner
    if session is not None and not session.failed and isinstance(runner, runners.MasterRunner):
        workers = len(runner.clients)
        runner.send_message(FINISH)
        with gevent.Timeout(COLLECT, False):
            while len(session.generators) < workers:
                gevent.sleep(0.05)
        if len(session.generators) < workers:
            logging.error("%d of %d workers gave no records", workers - len(session.generators), workers)


@events.test_stop.add_listener
def end(environment: Any, **_: Any) -> None:
    """Writes the raw data; on a worker, nothing."""
    if session is not None:
        if ChatUser.load:
            session.collect(**finish_load(ChatUser.load))
        session.finish()


class Shape(LoadTestShape):
    """Starts all users at once, and ends the test when each has nothing left to send and no answer to wait
    for."""

    use_common_options = True

    def tick(self) -> tuple[int, float] | None:
        """(users, users started per second), or None at the end."""
        runner = self.runner
        assert runner is not None
        options: Any = runner.environment.parsed_options
        settled = self.get_run_time() > (SETTLE if isinstance(runner, runners.MasterRunner) else 0)
        if runner.state == runners.STATE_RUNNING and settled and not runner.user_count:
            return None
        if session is not None and session.failed:
            return None
        users = options.num_users or 1
        if isinstance(runner, runners.MasterRunner):
            users = max(users, runner.worker_count)  # a worker sends its share only if it has a user
        return users, max(users, options.spawn_rate or 0)
