"""The rank-search benchmark itself: a small run, its resume, its analysis."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks/rank_search"
SETTINGS = {
    "pilot": True,
    "seeds": 2,
    "tasks": ["codes"],
    "steps": 30,
    "random": 2,
    "rates": [0.02],
    "repeats": 2,
    "examples": {"train": 480, "search": 128, "test": 64},
}


def command(script, *arguments):
    done = subprocess.run(
        [sys.executable, BENCHMARK / script, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.full
def test_a_run_goes_on_where_it_stopped_and_is_analysed(tmp_path):
    changes = [part for name, value in SETTINGS.items() for part in ("--set", f"{name}={json.dumps(value)}")]
    out = tmp_path / "run"
    assert "1 cells left" in command("run.py", "--out", out, "--cells", "1", *changes)
    first = (out / "rows.jsonl").read_text()
    assert "0 cells left" in command("run.py", "--out", out, *changes)
    rows = (out / "rows.jsonl").read_text()
    assert rows.startswith(first) and {json.loads(line)["seed"] for line in rows.splitlines()} == {0, 1}
    for row in map(json.loads, rows.splitlines()):
        assert 0.995 * row["uniform_parameters"] <= row["parameters"] <= row["uniform_parameters"]
    report = command("analyse.py", out, "--plots", tmp_path)
    assert "| 1 | restart | score |" in report and (tmp_path / "rank_search.png").exists()
