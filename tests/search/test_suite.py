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


def run(out, *arguments, **changes):
    settings = SETTINGS | changes
    sets = [part for name, value in settings.items() for part in ("--set", f"{name}={json.dumps(value)}")]
    return command("run.py", "--out", out, *arguments, *sets)


def page(folder):
    path = folder / "page.md"
    if not path.exists():
        path.write_text("before\n<!-- analyse.py: begin -->\n<!-- analyse.py: end -->\nafter\n")
    return path


@pytest.mark.full
def test_a_run_goes_on_where_it_stopped_and_is_analysed(tmp_path):
    out = tmp_path / "run"
    assert "1 cells left" in run(out, "--cells", "1")
    first = (out / "rows.jsonl").read_text()
    assert "0 cells left" in run(out)
    rows = (out / "rows.jsonl").read_text()
    assert rows.startswith(first) and {json.loads(line)["seed"] for line in rows.splitlines()} == {0, 1}
    for row in map(json.loads, rows.splitlines()):
        assert 0.995 * row["uniform_parameters"] <= row["parameters"] <= row["uniform_parameters"]
    run(tmp_path / "inherit", methods=["score", "svd", "uniform"], starts=["inherit"])
    run(tmp_path / "curve", methods=["score"], budgets=[0.5, 1], curve=[1, 2], seeds=1, random=0)
    report = command(
        "analyse.py",
        out,
        tmp_path / "inherit",
        tmp_path / "curve",
        "--plots",
        tmp_path,
        "--page",
        page(tmp_path),
    )
    for line in (
        "| 1 | restart | score |",
        "within random <= 10 (restart) |",
        "within random <= 10 (inherit) |",
        "| codes | parameters of `score` / uniform's |",
    ):
        assert line in report
    assert report.strip() in page(tmp_path).read_text()
    assert (tmp_path / "rank_search.png").exists() and (tmp_path / "rank_search_curve.png").exists()
