"""Requests without an adapter: a server with LoRA answers them bit for bit as a server without LoRA."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MIX = ("everything", "vision-1", "cross-kv-1")
LORA = {"enable_lora": True, "max_loras": 3, "max_lora_rank": 16}


def in_its_own_process(base: Path, adapters: dict[str, Path], options: dict, **environment: str) -> list:
    named = {name: str(folder) for name, folder in adapters.items()}
    done = subprocess.run(
        [
            sys.executable,
            Path(__file__).with_name("answers.py"),
            base,
            json.dumps(named),
            json.dumps(options),
        ],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def without_lora(checkpoint: Path) -> list:
    return in_its_own_process(checkpoint, {}, {})[0]


@pytest.mark.parametrize("ragged", ["0", pytest.param("1", marks=pytest.mark.full)])
def test_bits_of_a_server_without_lora(
    checkpoint: Path, adapters: dict[str, Path], without_lora: list, ragged: str
) -> None:
    """In new processes, both: how many threads the tests before have left torch decides the last bits too."""
    mix = {name: adapters[name] for name in MIX}
    alone, beside = in_its_own_process(checkpoint, mix, LORA, LVNAS_RAGGED=ragged)
    assert alone == without_lora
    assert [batch[::2] for batch in beside] == [batch[::2] for batch in without_lora]
    assert [batch[1::2] for batch in beside] != [batch[1::2] for batch in without_lora]
