"""The embedded base's architecture with two training steps: real files, no skill, made in seconds."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Two cores: threads that spin while they wait cost more than they bring.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def raw_tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from lvnas.bases.tiny import Pretraining, tiny_folder

    return tiny_folder(tmp_path_factory.mktemp("cache"), Pretraining(steps=2, batch_size=8))


@pytest.fixture
def lvnas(capsys: pytest.CaptureFixture[str]):
    """Runs a command line in this process; returns exit code, stdout and stderr."""
    import sys
    from unittest import mock

    from lvnas.cli import main

    def run(*arguments: object) -> tuple[int, str, str]:
        code = 0
        with mock.patch.object(sys, "argv", ["lvnas", *map(str, arguments)]):
            try:
                main()
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 0
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run
