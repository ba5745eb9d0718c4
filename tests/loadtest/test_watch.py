"""What is watched during a run: canary answers, adapters replaced, memory and metrics."""

import dataclasses
import json
import os
import subprocess
import sys

import psutil
import pytest

from lvnas.errors import InputError
from lvnas_loadtest import server as server_side
from lvnas_loadtest.canary import Canary
from lvnas_loadtest.churn import Churn
from lvnas_loadtest.packs import rank_class, read_pack
from lvnas_loadtest.records import Record, read_records
from lvnas_loadtest.run import run
from lvnas_loadtest.sampler import host_bytes, parse
from lvnas_loadtest.session import Session
from lvnas_loadtest.workload import Workload

MIB = 2**20


def test_a_wrong_adapter_is_caught(serve, tmp_path):
    """`b` answers with `a`'s words after a while: status 200, usual speed. `c` changes to words of its
    own."""
    quick = {"ttft": [0.01], "gap": [0.001], "parent": "base"}
    script = {
        "a": quick | {"answer": "one two three"},
        "b": quick | {"answer": "four five", "later_answer": "one two three", "later_from": 40},
        "c": quick | {"answer": "six", "later_answer": "seven", "later_from": 40},
    }
    server = serve(script)
    load = Workload(
        url=server.url, adapters=["a", "b", "c"], users=3, duration=4, canary_every=0.2, output_tokens="4"
    )
    result = run(load, tmp_path / "out")
    canary = result["canary"]
    assert canary["questions"] == 2 and not canary["indistinguishable"]
    assert canary["checks"] == canary["same"] + canary["changed"] + canary["wrong"] >= 9
    assert {event["adapter"]: event["verdict"] for event in canary["events"]} == {
        "b": "wrong: a",
        "c": "changed",
    }
    assert "answered for b with another adapter" in (tmp_path / "out/summary.md").read_text()
    usage = result["server"]["series"]
    assert usage["vllm:kv_cache_usage_perc"]["mean"] == 0.25
    assert MIB < usage["host_bytes"]["max"] < 500 * MIB
    assert usage["vllm:num_requests_running"]["max"] >= 1


def test_one_rounded_answer_is_not_another_adapter():
    recorded = {"a": ("1", "2", "3"), "b": ("1", "2", "4"), "c": ("5", "6", "3")}
    canary = Canary(Workload(url="http://127.0.0.1", adapters=list(recorded)), recorded)
    assert canary.alike() == [["a", "b"]]
    assert canary.verdict("a", ("1", "2", "4")) == "changed"
    assert canary.verdict("a", ("5", "6", "3")) == "wrong: c"
    assert canary.verdict("a", ("1", "2", "3")) == "same"


def test_adapters_that_the_canary_cannot_tell_apart_are_named(serve, tmp_path):
    quick = {"ttft": [0.01], "gap": [0.001], "answer": "same"}
    server = serve({"a": quick, "b": quick})
    load = Workload(url=server.url, adapters=["a", "b"], users=1, duration=1, canary_every=0.5)
    result = run(load, tmp_path / "out")
    assert result["canary"]["indistinguishable"] == [["a", "b"]] and result["canary"]["wrong"] == 0


def test_churn_replaces_adapters_without_failures(serve, tmp_path):
    quick = {"ttft": [0.02], "gap": [0.005]}
    later = {name: quick | {"unloaded": True} for name in ("a~1", "b~2", "a~3", "b~4")}
    server = serve({"a": quick, "b": quick} | later)
    load = Workload(
        url=server.url, adapters=["a", "b"], users=4, duration=4, churn=1.5, output_tokens="4",
        adapter_paths={"a": "/pack/adapters/a-1", "b": "/pack/adapters/b-1"},
    )  # fmt: skip
    result = run(load, tmp_path / "out")
    assert result["failed"] == 0 and result["completed"] > 20
    assert [event["adapter"] for event in result["churn"]][:2] == ["a", "b"]
    assert all(event["error"] is None for event in result["churn"])
    seen = server.requests()
    loads = [entry for entry in seen if "path" in entry]
    assert loads[0] == {"path": "/v1/load_lora_adapter", "model": "a~1", "lora_path": "/pack/adapters/a-1"}
    assert sum(entry["model"] == "a~1" for entry in seen if "sent" in entry) > 0
    assert {"a", "b"} <= set(server_side.served_models(server.url))  # every adapter has its own name again
    assert (
        result["temperature"]["cold"]["completed"] >= 4
    )  # the first of each, and the first of each new name


@pytest.fixture
def churned(serve):
    """A server of a and b, a churn whose step for `a` was cut short before the old name was unloaded, and the
    route of `a` moved."""

    def make(script):
        server = serve(script | {"a~1": {"unloaded": True}})
        load = Workload(
            url=server.url, adapters=["a", "b"], churn=60.0, adapter_paths={"a": "/pack/a", "b": "/pack/b"}
        )
        churn = Churn(load, lambda adapter, url, model: load.routes.update({adapter: [url, model]}))
        server_side.post(server.url, "/v1/load_lora_adapter", {"lora_name": "a~1", "lora_path": "/pack/a"})
        load.routes["a"] = [server.url, "a~1"]
        return server, load, churn

    return make


def test_names_that_are_still_served_are_not_loaded_again(churned):
    server, load, churn = churned({"a": {}, "b": {}})
    churn.restore(9.0)
    assert churn.events == []
    assert server_side.served_models(server.url) == ["a", "b"]
    assert load.route("a") == (server.url, "a")


def test_an_adapter_that_cannot_be_restored_is_noted(churned):
    server, load, churn = churned({"a": {"unloaded": True, "fault": "no load"}, "b": {"unloaded": True}})
    server_side.post(server.url, "/v1/load_lora_adapter", {"lora_name": "b~2", "lora_path": "/pack/b"})
    load.routes["b"] = [server.url, "b~2"]
    churn.restore(9.0)
    [event] = churn.events
    assert (event["at"], event["adapter"]) == (9.0, "a") and "has already been loaded" in event["error"]
    assert server_side.served_models(server.url) == ["a~1", "b"]


def test_the_records_are_written_before_adapters_are_restored(serve, tmp_path, monkeypatch):
    server = serve({"a": {"ttft": [0.01], "gap": [0.001]}})
    load = Workload(url=server.url, adapters=["a"], churn=60.0, adapter_paths={"a": "/pack/a"})
    load.write(tmp_path / "workload.json")
    session = Session(str(tmp_path / "workload.json"), str(tmp_path), None, None)
    session.prepare(lambda *_: None)
    session.begin()
    session.collect([dataclasses.asdict(Record(adapter="a"))], {})
    monkeypatch.setattr(session.churn, "restore", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        session.finish()
    assert len(read_records(tmp_path / "records.jsonl")) == 1
    assert json.loads((tmp_path / "run.json").read_text())["churn"] == []


def test_churn_needs_the_pack(serve, tmp_path):
    server = serve({"a": {"ttft": [0.02], "gap": [0.005]}})
    with pytest.raises(InputError, match="churn needs the folders of a; give the --pack"):
        run(Workload(url=server.url, adapters=["a"], churn=1.0), tmp_path / "out")


def test_metrics_are_parsed_and_summed_over_engines():
    text = (
        "# HELP vllm:num_requests_running x\n"
        'vllm:num_requests_running{engine="0",model_name="m"} 3.0\n'
        'vllm:num_requests_running{engine="1",model_name="m"} 4.0\n'
        'vllm:time_to_first_token_seconds_bucket{engine="0",le="0.1"} 9.0\n'
        'vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="100"} 1.0\n'
        'vllm:generation_tokens_total{engine="0"} 1.5e+03\n'
        'vllm:lora_requests_info{max_lora="4",running_lora_adapters="a,b"} 1.7e+09\n'
        "python_gc_objects_collected_total 4\n"
    )
    assert parse(text) == {
        "vllm:num_requests_running": 7.0,
        "kv_tokens": 1600.0,
        "vllm:generation_tokens_total": 1500.0,
    }


def test_memory_of_a_process_and_its_children():
    program = (
        "import os, sys, time; kept = bytearray(os.urandom(64 << 20)); print(1, flush=True); time.sleep(60)"
    )
    nested = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {program!r}])"
    process = subprocess.Popen([sys.executable, "-c", nested], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    try:
        assert 64 * MIB < host_bytes([process.pid]) < 120 * MIB
        assert 64 * MIB < host_bytes([process.pid, process.pid]) < 120 * MIB
    finally:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.wait()
    assert host_bytes([]) is None and host_bytes([process.pid]) is None


def test_processes_that_listen(serve):
    server = serve({"a": {"ttft": [0.02], "gap": [0.005]}})
    assert server_side.listening_processes(server.url) == [server.pid]
    assert server_side.listening_processes("http://192.0.2.1:80") == []
    assert os.getpid() not in server_side.listening_processes(server.url)


def test_pack(tmp_path):
    entry = {"name": "x", "path": "adapters/x-0", "ranks": {"m.0": 8, "m.1": 64, "m.2": 0}}
    manifest = {"adapters": [entry], "serve": {"max_loras": 4, "max_lora_rank": 64}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    pack = read_pack(tmp_path)
    assert pack.adapters == ["x"] and pack.rank_classes == {"x": "mixed <= 64"} and pack.slots == 4
    assert pack.paths == {"x": str(tmp_path / "adapters/x-0")}
    assert [rank_class(ranks) for ranks in ([16, 16, 0], [4, 8], [])] == ["rank 16", "mixed <= 8", "rank 0"]
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(InputError, match="is no pack's manifest"):
        read_pack(tmp_path)
