import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lvnas.cli import VERBS

ROOT = Path(__file__).parents[1]


def test_help_lists_every_verb(lvnas):
    code, out, _ = lvnas("--help")
    assert code == 0
    for verb in VERBS:
        assert f"\n  {verb}" in out


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_and_json(lvnas, verb):
    code, out, _ = lvnas(verb, "--help")
    assert code == 0
    if verb == "loadtest":
        code, out, _ = lvnas(verb, "run", "--help")
    assert "--json" in out


def test_help_imports_nothing_heavy():
    code = (
        "import sys, lvnas.cli\n"
        "try: lvnas.cli.main()\n"
        "finally: print([m for m in ('torch', 'vllm', 'transformers', 'locust') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "[]"


def test_unknown_verb_and_option(lvnas):
    code, _, err = lvnas("serch")
    assert code == 2
    assert err == f"lvnas: unknown command 'serch'; allowed: {', '.join(VERBS)}\n"
    code, _, err = lvnas("params", "--rnk", 4)
    assert code == 2
    assert "--rnk" in err and err.count("\n") == 1


def test_tasks(lvnas, tmp_path):
    code, out, _ = lvnas("tasks", "--json")
    assert code == 0
    assert "codewords" in json.loads(out)["embedded"] and "docvqa" in json.loads(out)["the_cauldron"]
    code, out, _ = lvnas("tasks", "sum", "--show", 2, "--out", tmp_path / "images", "--json")
    assert code == 0
    assert len(json.loads(out)["examples"]) == 2
    assert len(list((tmp_path / "images").glob("*.png"))) == 2


def test_bases(lvnas):
    code, out, _ = lvnas("bases", "--json")
    assert code == 0
    assert set(json.loads(out)) == {"tiny", "llama-3.2-11b-vision", "llama-3.2-90b-vision"}


def test_doctor(lvnas, monkeypatch):
    code, out, _ = lvnas("doctor", "--json")
    findings = {finding["what"]: finding for finding in json.loads(out)}
    assert code == 0
    assert all(finding["ok"] for finding in findings.values())
    assert "vllm" in findings["serving back end"]["found"]
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    code, out, _ = lvnas("doctor")
    assert code == 1
    assert "FAIL vLLM plugin: RuntimeError: VLLM_PLUGINS=other" in out


def test_ctrl_c_leaves_no_half_written_output(raw_tiny, tmp_path):
    """SIGINT in the middle of a search: one line, code 130, nothing but the state to resume from."""
    arguments = [
        "search",
        "sum",
        "--base",
        raw_tiny,
        "--method",
        "darts",
        "--steps",
        500,
        "--out",
        tmp_path / "out",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "lvnas", *map(str, arguments)], stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        # A shell's background job, as CI may be, ignores SIGINT, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    deadline = time.monotonic() + 240
    while not (tmp_path / "out").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    try:
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "interrupted" in err.splitlines()[-1]
    assert "Traceback" not in err
    assert {path.name for path in (tmp_path / "out").iterdir()} <= {"state.pt"}


def test_the_help_page_is_in_step():
    done = subprocess.run(
        [sys.executable, "scripts/help-page", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_place_that_cannot_be_written_is_one_line(lvnas, tmp_path):
    (tmp_path / "file").write_text("x")
    for arguments in (
        ["tasks", "codewords", "--out", tmp_path / "file/x"],
        ["search", "codewords", "--method", "uniform", "--params", "100k", "--out", tmp_path / "file/x"],
        ["search", "codewords", "--method", "uniform", "--params", "100k", "--out", tmp_path / "file"],
    ):
        code, out, err = lvnas(*arguments)
        assert (code, out) == (2, ""), err
        assert err.count("\n") == 1 and str(tmp_path / "file") in err
