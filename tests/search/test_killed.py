"""Searches that are killed go on to bit-identical scores, whatever the moment; nothing is left behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("killed.py")


@pytest.mark.full
def test_killed_at_any_moment(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parent)}
    subprocess.run([sys.executable, SCRIPT, tmp_path], check=True, timeout=600, env=environment)
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report) == {"score", "darts", "svd", "adalora", "eva"}
    for found in report.values():
        assert len(found["same"]) == 7 and all(found["same"])
        assert set(found["files"]) <= {"scores.json", "update.safetensors"}
