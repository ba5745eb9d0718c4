"""Cost tables measured here, and budgets spent in them."""

import json

import pytest

from lvnas import profile


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(profile, "SECONDS", 0.002)


def test_a_latency_budget_is_spent_on_what_was_measured(lvnas, raw_tiny, tmp_path, quick):
    file = tmp_path / "costs.json"
    measure = ("profile", "--base", raw_tiny, "--targets", "qk", "--ranks", "0,2,64", "--out", file)
    code, printed, errors = lvnas(*measure, "--adapters", 4, "--json")
    assert code == 0, errors
    summary = json.loads(printed)
    assert summary["shapes"] == 3 and all(seconds > 0 for seconds in summary["random_plan"].values())
    tables = json.loads(file.read_text())["tables"]
    assert tables["params"]["costs"]["192x96"] == [0, 2 * 288, 64 * 288]
    assert tables["pad"]["costs"]["192x96"] == [0, 2 * 8 * 288, 2 * 64 * 288]
    latency = tables["latency"]["costs"]
    assert sum(row[-1] for row in latency.values()) > sum(row[0] for row in latency.values()) > 0

    search = ("search", "codewords", "--base", raw_tiny, "--method", "random", "--targets", "qk")
    search += ("--ranks", "0,2,64", "--out", tmp_path / "out", "--json")
    by = ("--budget-by", "latency", "--costs", file)
    code, printed, errors = lvnas(*search, *by, "--ratio", 1.3)
    assert code == 0, errors
    found = json.loads(printed)
    assert found["by"] == "latency" and 0.995 * found["budget"] <= found["spent"] <= found["budget"]
    code, _, errors = lvnas(*search, *by, "--budget", "1s")
    assert code == 2 and "budget 1 cannot be reached; this space and these targets reach" in errors
    code, _, errors = lvnas(*search, "--budget-by", "latency", "--ratio", 2)
    assert code == 2 and "latency must be measured" in errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--adapters", 0), "0 adapters; a step needs at least one"),
        (("--dtype", "int4"), "unknown dtype 'int4'; allowed: bfloat16, float32"),
        (("--targets", "qkv"), "match no linear module"),
        (("--ranks", "8"), "two or more different"),
    ],
)
def test_bad_input(lvnas, raw_tiny, tmp_path, arguments, message):
    code, _, errors = lvnas("profile", "--base", raw_tiny, *arguments, "--out", tmp_path / "costs.json")
    assert code == 2 and message in errors.splitlines()[-1]
    assert not (tmp_path / "costs.json").exists()
