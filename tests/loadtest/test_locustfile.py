"""The locustfile as Locust's own users start it: with the web UI."""

import ast
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.parse
import urllib.request

import pytest

from lvnas_loadtest.run import LOCUSTFILE
from lvnas_loadtest.servers import free_port
from lvnas_loadtest.workload import Workload


def test_locust_is_imported_first():
    """Locust patches sockets when it is imported; a formatter must not put anything that opens them before it."""
    imports = [
        node
        for node in ast.parse(LOCUSTFILE.read_text()).body
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    assert isinstance(imports[0], ast.Import) and imports[0].names[0].name == "locust"


@pytest.mark.parametrize("options", [[], ["--processes", "2"]], ids=["alone", "workers"])
def test_a_load_that_cannot_be_made_ends_the_test(options, serve, tmp_path):
    """No user may be left to ask for ever for a load that its process does not have."""
    server = serve({"a": {"ttft": [0.02], "gap": [0.002]}})
    arrivals = f"trace:{tmp_path / 'none.csv'}"
    Workload(url=server.url, adapters=["a"], arrivals=arrivals).write(tmp_path / "workload.json")
    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--host", server.url, "--headless"]
    command += ["--workload", str(tmp_path / "workload.json"), "--out", str(tmp_path), *options]
    with (tmp_path / "locust.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        assert process.wait(60) == 2
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    errors = [line for line in (tmp_path / "locust.log").read_text().splitlines() if "ERROR" in line]
    assert "cannot read the trace" in errors[0] and len(errors) < 10


def get(url: str, form: dict | None = None) -> bytes:
    data = urllib.parse.urlencode(form).encode() if form else None
    with urllib.request.urlopen(url, data, timeout=10) as answer:
        return answer.read()


def test_web_ui_starts_and_stops_a_test(serve, tmp_path):
    server = serve({"a": {"ttft": [0.02], "gap": [0.002]}, "b": {"ttft": [0.02], "gap": [0.002]}})
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "locust",
        "-f",
        str(LOCUSTFILE),
        "--host",
        server.url,
        "--out",
        str(tmp_path),
    ]
    command += ["--web-host", "127.0.0.1", "--web-port", str(port)]
    ui = f"http://127.0.0.1:{port}"
    with (tmp_path / "locust.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        for _ in range(120):
            try:
                assert b"Locust" in get(ui)
                break
            except OSError:
                time.sleep(0.5)
        answer = json.loads(get(f"{ui}/swarm", {"user_count": "2", "spawn_rate": "2", "host": server.url}))
        assert answer["success"]
        for _ in range(120):
            stats = {row["name"]: row for row in json.loads(get(f"{ui}/stats/requests"))["stats"]}
            if all(stats.get(name, {}).get("num_requests", 0) >= 3 for name in ("a", "b")):
                break
            time.sleep(0.5)
        assert stats["a"]["num_failures"] == stats["b"]["num_failures"] == 0
        assert stats["a"]["num_requests"] >= 3 and stats["b"]["num_requests"] >= 3
        get(f"{ui}/stop", {"stop": ""})
        for _ in range(60):
            if (tmp_path / "run.json").exists():
                break
            time.sleep(0.5)
        assert json.loads((tmp_path / "run.json").read_text())["workload"]["adapters"] == ["a", "b"]
        lines = (tmp_path / "records.jsonl").read_text().splitlines()
        assert len(lines) >= 6 and all(json.loads(line)["error"] is None for line in lines)
    finally:
        process.terminate()
        process.wait()
