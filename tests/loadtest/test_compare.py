"""Comparisons and capacities against scripted servers whose ratio and limit are known."""

import contextlib
import json
import math
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import save_file
from scipy import stats

from lvnas.errors import InputError
from lvnas_loadtest import resident
from lvnas_loadtest.capacity import rate_capacity, search
from lvnas_loadtest.compare import EFFECTS, SLOTS, USAGE, Plan, compare, ratio, ratios
from lvnas_loadtest.deployments import KINDS, Deployment, Engine, deployments
from lvnas_loadtest.servers import free_port, running
from lvnas_loadtest.workload import Workload


def test_two_running_servers(serve, tmp_path):
    """One server is twice as fast as the other; both rounds say so, with the same requests for both."""
    slow = serve({name: {"ttft": [0.2], "gap": [0.04]} for name in ("a", "b")})
    fast = serve({name: {"ttft": [0.1], "gap": [0.02]} for name in ("a", "b")})
    made = deployments([f"slow={slow.url}", f"fast={fast.url}"], [], [], tmp_path / "packs")
    load = Workload(
        url="http://127.0.0.1", adapters=["a", "b"], users=2, requests=12, output_tokens="10", seed=5
    )
    comparison = compare(Plan(deployments=made, workload=load, rounds=2), tmp_path / "out")
    [effect] = comparison["ratios"]
    assert (effect["of"], effect["to"]) == ("fast", "slow")
    # Wide: other work on the machine delays both servers by as much, which brings the ratios nearer to 1.
    assert 1.2 < effect["ratios"]["output_throughput"]["ratio"] < 2.2
    assert 0.45 < effect["ratios"]["median_tpot_ms"]["ratio"] < 0.8
    assert effect["ratios"]["device_bytes"] is None
    for server in (slow, fast):
        assert len(server.requests()) == 2 * (
            12 + 2
        )  # two rounds, each with two requests to measure the tokenizer
    texts = [sorted(request["text"] for request in server.requests()) for server in (slow, fast)]
    assert texts[0] == texts[1]
    assert json.loads((tmp_path / "out/compare.json").read_text()) == comparison
    page = (tmp_path / "out/compare.html").read_text()
    assert "fast against slow" in page and "<svg" in page
    assert (
        "<script" not in page and "<link" not in page and "<img" not in page
    )  # it needs nothing from elsewhere


def test_ratio_and_its_interval():
    ours, theirs = ([{"x": value} for value in values] for values in ((2.0, 2.2, 1.9), (1.0, 1.0, 1.0)))
    logs = np.log([2.0, 2.2, 1.9])
    low, high = stats.t.interval(0.95, 2, logs.mean(), stats.sem(logs))
    found = ratio(ours, theirs, "x")
    assert found == pytest.approx(
        {"ratio": math.exp(logs.mean()), "rounds": 3, "low": math.exp(low), "high": math.exp(high)}
    )
    assert ratio(ours[:1], theirs[:1], "x") == {"ratio": pytest.approx(2.0), "rounds": 1}
    assert ratio([{"x": None}], theirs, "x") is None and ratio([], theirs, "x") is None


def test_effects_split_operators_from_ranks():
    assert {name for _, of, to in EFFECTS for name in (of, to)} == set(KINDS)
    usual = dict.fromkeys(("output_throughput", "request_throughput", "median_ttft_ms", "p99_ttft_ms",
                           "median_tpot_ms", "p99_tpot_ms", "median_e2el_ms", *USAGE, *SLOTS), 1.0)  # fmt: skip
    rounds = {name: [usual | {"output_throughput": speed}] for name, speed in
              (("stock-64", 10.0), ("ragged-64", 12.0), ("ragged-mixed", 18.0))}  # fmt: skip
    found = {effect["effect"]: effect["ratios"]["output_throughput"]["ratio"] for effect in ratios(rounds)}
    operators, ranks = found["our operators, equal ranks"], found["mixed ranks on our operators"]
    assert operators == pytest.approx(1.2) and ranks == pytest.approx(1.5)
    assert found["operators and mixed ranks"] == pytest.approx(operators * ranks)


@pytest.mark.parametrize("limit", [0.3, 1.0, 7.3, 64.0, 999.0])
def test_search_finds_the_limit(limit):
    tried: list[float] = []
    found = search(1.0, 0.05, lambda value: tried.append(value) or value <= limit, 1000.0)
    assert 0.94 * limit <= found <= limit and len(tried) < 25


def test_search_at_its_ends():
    assert search(1.0, 0.1, lambda value: True, 50.0) == 50.0
    assert search(1.0, 0.1, lambda value: False, 50.0) == 0.0


@pytest.mark.full
def test_rate_within_slo(serve, tmp_path):
    """The server answers one request at a time and takes 50 ms for each: no rate above 20/s can stay
    within SLOs."""
    server = serve({"a": {"ttft": [0.05], "gap": [0.001], "serial": True}})
    load = Workload(url=server.url, adapters=["a"], duration=3, output_tokens="1", slo={"ttft": 400.0})
    found = rate_capacity(load, tmp_path, first=10, tolerance=0.4)
    assert 8 <= found["rate"] <= 22
    assert any(not one["within"] for one in found["tries"]) and any(one["within"] for one in found["tries"])
    with pytest.raises(InputError, match="give at least one, such as --goodput"):
        rate_capacity(Workload(url=server.url, adapters=["a"]), tmp_path)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["stock"], "unknown deployment 'stock'; allowed: base, stock-64"),
        (["stock-64"], "deployment stock-64 needs adapters; give them with --uniform"),
        (["base", "base"], "a name occurs twice"),
        (["base"], "the adapters name no base"),
    ],
)
def test_bad_deployments(tmp_path, names, words):
    with pytest.raises(InputError, match=words):
        deployments(names, [], [], tmp_path)


def test_a_server_that_cannot_start_is_reported_and_gone(tmp_path):
    deployment = Deployment(name="x", engines=[Engine(models={"a": ""}, base=str(tmp_path / "none"))])
    with pytest.raises(InputError, match="none"), running(deployment, [], tmp_path):
        raise AssertionError("it cannot run")
    assert 0 < free_port() < 65536


@pytest.fixture
def adapters(tmp_path):
    """The folders of two small adapters, a and b."""
    ranks = {
        "model.language_model.layers.0.self_attn.q_proj": 4,
        "model.language_model.layers.0.mlp.up_proj": 16,
    }
    folders = []
    for name in "ab":
        adapter = peft.LoraConfig(r=4, rank_pattern=ranks, target_modules=list(ranks))
        adapter.base_model_name_or_path = "example/base"
        adapter.save_pretrained(tmp_path / name)
        weights = {
            f"base_model.model.{module}.lora_{part}.weight": torch.ones(
                (rank, 8) if part == "A" else (12, rank)
            )
            for module, rank in ranks.items()
            for part in "AB"
        }
        save_file(weights, tmp_path / name / "adapter_model.safetensors")
        folders.append(str(tmp_path / name))
    return folders


def test_packs_are_of_this_comparisons_adapters(adapters, tmp_path):
    for chosen in (adapters, adapters[1:]):
        [made] = deployments(["stock-mixed"], chosen, [], tmp_path / "packs")
        assert [*made.engines[0].models] == [Path(folder).name for folder in chosen]
        assert made.slots == len(chosen)


def test_no_adapter_fits(lvnas, adapters, tmp_path, monkeypatch):
    """The first try's error is the answer; no number below one is tried, and no copy of the adapters is left."""
    errors = [InputError("the server ended (exit code 1): bad flag"), OSError(28, "No space left on device")]
    for error in errors:

        @contextlib.contextmanager
        def broken(*_, error=error):
            assert (tmp_path / "out/1-adapters/packs").exists()
            raise error
            yield

        monkeypatch.setattr(resident, "running", broken)
        options = ("--mixed", tmp_path / "a", "--memory", "6GB", "--out", tmp_path / "out")
        code, out, err = lvnas("loadtest", "resident", "stock-mixed", *options)
        assert code == 2 and out == ""
        assert err.splitlines()[-1] == f"lvnas: no adapter fits in stock-mixed: {error}"
        result = json.loads((tmp_path / "out/resident.json").read_text())
        assert [one["adapters"] for one in result["tries"]] == [1]
        assert (result["adapters"], result["limit_bytes"]) == (0, 6 * 10**9)
        assert not list(tmp_path.glob("out/*/packs"))


def test_what_the_resident_adapters_take(adapters, tmp_path):
    """Stock slots at the highest rank for two adapters, the ragged pool at each module's own; 4 bytes a number."""
    made = deployments(["stock-mixed", "ragged-mixed"], adapters, [], tmp_path / "packs", slots=2)
    assert [one.adapter_bytes for one in made] == [2 * 2 * 16 * 20 * 4, 2 * (4 + 16) * 20 * 4]
    assert [one.slots for one in made] == [2, 2]
