"""The benchmark of a search step's cost runs, and the memory it measures is plain LoRA's."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks/rank_search/step_cost.py"


@pytest.mark.full
def test_a_step_takes_the_memory_of_plain_lora(tmp_path):
    out = tmp_path / "cost.json"
    command = [sys.executable, SCRIPT, "--bases", "wide", "--turns", "3", "--out", out]
    subprocess.run(command, check=True, timeout=300)
    [row] = json.loads(out.read_text())["rows"]
    memory = {name: column["memory / plain"] for name, column in row["columns"].items()}
    assert set(memory) == {
        "plain", "score first steps", "score", "darts weights", "darts alpha"
    }  # fmt: skip
    assert all(ratio < 1.05 for ratio in memory.values())
    assert row["columns"]["plain"]["peak bytes"] > 50e6
