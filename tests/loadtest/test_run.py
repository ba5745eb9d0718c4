"""Whole runs (Locust in its own process) against scripted servers with known delays."""

import csv
import dataclasses
import json

import numpy as np
import pytest

from lvnas.errors import InputError
from lvnas_loadtest.records import read_records
from lvnas_loadtest.results import details
from lvnas_loadtest.run import run
from lvnas_loadtest.workload import Workload

TTFT = [0.10, 0.15, 0.20, 0.30, 0.45]
GAP = [0.04, 0.05, 0.06, 0.08, 0.12, 0.03]


def truth(requests: list[dict]) -> dict[str, np.ndarray]:
    """The times in ms that the server's own clock gives for what it sent."""
    sent = [np.asarray([request["received"], *request["sent"]]) for request in requests]
    return {
        "ttft": np.asarray([s[1] - s[0] for s in sent]) * 1000,
        "tpot": np.asarray([(s[-1] - s[1]) / (len(s) - 2) for s in sent]) * 1000,
        "itl": np.concatenate([np.diff(s[1:]) for s in sent]) * 1000,
        "e2el": np.asarray([s[-1] - s[0] for s in sent]) * 1000,
    }


def test_every_percentile_is_true(priority, serve, tmp_path):
    """Against known delays, each percentile of each adapter within 2 ms or 2%. A wrong clock is wrong every time; a
    machine that is late because of others is not, so up to five attempts are made."""
    script = {"a": {"ttft": TTFT, "gap": GAP}, "b": {"ttft": [0.25], "gap": [0.06], "split": True}}
    for attempt in range(5):
        server = serve(script)
        load = Workload(
            url=server.url,
            adapters=["a", "b"],
            users=6,
            requests=60,
            output_tokens="12",
            popularity="distinct",
        )
        result = run(load, tmp_path / f"out{attempt}")
        assert result["completed"] == 60 and result["failed"] == 0
        wrong = [
            error for adapter in ("a", "b") for error in errors(result["adapters"][adapter], server, adapter)
        ]
        if not wrong:
            break
    assert not wrong


def errors(row: dict, server, adapter: str) -> list[tuple]:
    """The percentiles of an adapter that are neither within 2 ms nor 2% of what its server did."""
    assert row["completed"] == 30
    assert (row["total_input_tokens"], row["total_output_tokens"]) == (30 * 11, 30 * 12)
    # Not the two requests of one token that measure the tokenizer before the load.
    sent = [one for one in server.requests() if one["model"] == adapter and one["max_tokens"] > 1]
    found = []
    for metric, values in truth(sent).items():
        for percentile in (50, 90, 95, 99):
            known, reported = np.percentile(values, percentile), row[f"p{percentile}_{metric}_ms"]
            if not abs(reported - known) <= max(2.0, 0.02 * known):
                found.append((adapter, metric, percentile, known, reported))
    return found


def test_report_files_and_counts(serve, tmp_path):
    """Warm-up is sent and not counted, failures are counted and named, the files agree with the result."""
    script = {
        "a": {"ttft": [0.02], "gap": [0.002]},
        "cut": {"ttft": [0.02], "gap": [0.002], "fault": "truncate"},
    }
    server = serve(script)
    load = Workload(
        url=server.url, adapters=["a", "cut"], rank_classes={"a": "rank 8"}, users=3, duration=2, warmup=1,
        popularity="distinct", output_tokens="5", slo={"ttft": 1000.0}, timeout=5,
    )  # fmt: skip
    result = run(load, tmp_path / "out")
    assert json.loads((tmp_path / "out/result.json").read_text()) == result
    seen, rows = server.requests(), list(csv.DictReader((tmp_path / "out/requests.csv").open()))
    records = read_records(tmp_path / "out/records.jsonl")
    assert len(rows) == len(records) == result["num_prompts"] + result["warmup_requests"]
    assert result["warmup_requests"] > 0 and result["failed"] == result["adapters"]["cut"]["failed"] > 0
    seen = [request for request in seen if request["max_tokens"] > 1]
    assert len(seen) == sum(record.error is None for record in records)
    assert result["adapters"]["cut"]["completed"] == 0 and result["adapters"]["cut"]["median_ttft_ms"] is None
    assert sum(result["errors"].values()) == result["failed"]
    assert set(result["rank_classes"]) == {"rank 8", "no adapter"}
    assert result["request_goodput"] == pytest.approx(result["request_throughput"])
    assert {"image", "text only"} == set(result["content"])
    detail = details(records)
    assert len(detail["ttfts"]) == len(detail["itls"]) == len(rows)


def test_open_loop_in_two_processes(serve, tmp_path):
    """An open loop sends its whole schedule on time, whatever answers take, also from two workers."""
    server = serve({"slow": {"ttft": [1.5], "gap": [0.01]}})
    load = Workload(url=server.url, adapters=["slow"], arrivals="constant:20", requests=40, output_tokens="2")
    result = run(load, tmp_path / "out", ["--processes", "2"])
    assert result["completed"] == 40 and len(result["generator"]["processes"]) == 2
    assert result["send_lag"]["p99_send_lag_ms"] < 200
    assert result["max_concurrent_requests"] >= 25  # a closed loop would have one a process
    received = sorted(request["received"] for request in server.requests() if request["max_tokens"] > 1)
    assert received[-1] - received[0] == pytest.approx(39 / 20, abs=0.5)


def test_what_was_not_ours_is_kept(serve, tmp_path):
    server = serve({"a": {"ttft": [0.02], "gap": [0.002]}})
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("x")
    with pytest.raises(InputError, match="holds something else"):
        run(Workload(url=server.url, adapters=["a"]), tmp_path / "out")
    assert (tmp_path / "out/thesis.tex").exists() and not server.requests()


def test_a_missing_trace_and_a_bad_locust_option(serve, tmp_path):
    server = serve({"a": {"ttft": [0.02], "gap": [0.002]}})
    load = Workload(url=server.url, adapters=["a"], requests=1)
    with pytest.raises(InputError, match=r"exit code 2\): .*--nonsense"):
        run(load, tmp_path / "out", ["--nonsense", "3"])
    missing = dataclasses.replace(load, arrivals=f"trace:{tmp_path / 'none.csv'}")
    with pytest.raises(InputError, match=r"^cannot read the trace .*none.csv: No such file"):
        run(missing, tmp_path / "out")
    assert not server.requests() and not (tmp_path / "out").exists()


def test_json_of_a_run_without_answers(lvnas, monkeypatch, serve, tmp_path):
    server = serve({"a": {"ttft": [0.02], "gap": [0.002], "fault": "http 500"}})
    monkeypatch.chdir(tmp_path)
    options = ("--requests", 2, "--canary-every", "0s", "--allow-saturated", "--json")
    code, out, err = lvnas("loadtest", server.url, *options)
    assert (code, err.splitlines()[-1]) == (2, "lvnas: no counted request was answered")
    assert json.loads(out)["failed"] == 2
    assert (tmp_path / "loadtest-report/run.json").exists()


@pytest.mark.parametrize(
    ("adapters", "words"),
    [(["nope"], "serves no model nope; it serves a"), ([], "no adapters to ask for")],
)
def test_bad_input(serve, tmp_path, adapters, words):
    server = serve({"a": {"ttft": [0.02], "gap": [0.002]}})
    with pytest.raises(InputError, match=words):
        run(Workload(url=server.url, adapters=adapters), tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))
