"""Run by `test_killed.py`: searches killed at moments of all kinds, started again, compared with one that was not.

Every search runs in a forked child, so that torch is imported once.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import search_models as models
import torch
from test_search import SPACE, Stream

from lvnas import files, search
from lvnas.strategies import SearchConfig

METHODS = ("score", "darts", "svd", "adalora", "eva")


def run(method: str, out: Path) -> None:
    config = SearchConfig(method=method, ranks=SPACE, steps=6, batch_size=2, learning_rate=1e-2)
    search.run(models.mllama(), Stream(0), Stream(100), config, out, save_every=1)


def killed_at_replace(number: int, *, after: bool):
    """Kills the process around its `number`-th file."""
    replace, count = os.replace, 0

    def stop(source, target):
        nonlocal count
        count += 1
        if after:
            replace(source, target)
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        if not after:
            replace(source, target)

    return stop


def child(method: str, out: Path, *, replace=None, delay: float | None = None) -> int:
    """The exit status of a search in a fork, killed after `delay` seconds."""
    process = os.fork()
    if process == 0:
        if replace:
            os.replace = replace
        try:
            run(method, out)
        except BaseException as error:
            print(f"{method}: {error!r}", file=sys.stderr)
            os._exit(1)
        os._exit(0)
    if delay is not None:
        time.sleep(delay)
        os.kill(process, signal.SIGKILL)
    return os.waitpid(process, 0)[1]


def result(out: Path) -> tuple:
    scores = files.read_json(out / "scores.json")
    update = out / "update.safetensors"
    trained = files.sha256(update) if update.exists() else None
    return scores["values"], scores["errors"], scores["losses"], trained


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    draw, report = random.Random(7), {}
    for method in METHODS:
        start = time.monotonic()
        assert child(method, folder / method / "whole") == 0
        seconds = time.monotonic() - start
        expected = result(folder / method / "whole")
        kills = [{"replace": killed_at_replace(n, after=a)} for n in (1, 3, 7) for a in (False, True)]
        outcomes = []
        for number, kill in enumerate(kills):
            out = folder / method / f"replace-{number}"
            assert child(method, out, **kill) == signal.SIGKILL
            assert child(method, out) == 0
            outcomes.append(result(out) == expected)
        out, status, attempts = folder / method / "random", -1, 0
        while status != 0 and attempts < 8:
            attempts += 1
            status = child(method, out, delay=draw.uniform(0, 1.2 * seconds))
            assert status in (0, signal.SIGKILL)
        assert child(method, out) == 0
        outcomes.append(result(out) == expected)
        left = {path.name for place in (folder / method).iterdir() for path in place.iterdir()}
        report[method] = {"same": outcomes, "kills": len(kills) + attempts, "files": sorted(left)}
    files.write_json(folder / "report.json", report)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
