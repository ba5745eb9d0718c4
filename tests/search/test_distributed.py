"""A search in two processes: against one process on the same global batches."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).with_name("two_processes.py")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parent)}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    out = tmp_path_factory.mktemp("processes")
    for command in ((sys.executable,), TORCHRUN):
        subprocess.run([*command, SCRIPT, out], check=True, timeout=300, env=ENVIRONMENT)
    return {name: json.loads((out / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1")}


@pytest.mark.full
@pytest.mark.parametrize("method", ["score", "darts", "adalora"])
def test_two_processes_find_what_one_finds(found, method):
    one, first, second = (found[name][method] for name in ("1-0", "2-0", "2-1"))
    assert first == second
    assert first["losses"] == pytest.approx(one["losses"], rel=1e-5)
    gains = np.array(one["gains"])
    np.testing.assert_allclose(first["gains"], gains, atol=1e-3 * np.abs(gains).max())
    assert first["ranks"] == one["ranks"]


@pytest.mark.full
def test_nan_in_one_process_stops_both_and_both_resume(found):
    for run in found.values():
        assert "step 3: loss is nan on train examples" in run["message"]
        assert "14" in run["message"].partition(";")[0] and "state before it is in" in run["message"]
        assert run["resumed"] == run["score"]
    assert found["2-1"]["refusal"] == "method eva runs in one process, not in 2"


@pytest.mark.full
def test_the_command_line_under_torchrun(raw_tiny, tmp_path):
    arguments = ["search", "codewords", "--base", raw_tiny, "--method", "score"]
    arguments += ["--steps", "5", "--batch-size", "4", "--targets", "qk", "--ranks", "0,2,4", "--ratio", "2"]
    command = [*TORCHRUN, "-m", "lvnas", *arguments, "--out", tmp_path / "out", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["spent"] > 0  # printed once
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"ranks.json", "scores.json"}
