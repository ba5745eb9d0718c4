"""kill -9 at random moments: the pack is the old one or the new one, never between, and the next run finishes it."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from makers import make_adapter

from lvnas.adapters import read_adapter
from lvnas.manifest import read_manifest
from lvnas.pack import PackOptions, pack
from lvnas.verify import verify

MODULES = {
    f"model.layers.{layer}.{name}": (512, 512, 8) for layer in range(12) for name in ("q_proj", "v_proj")
}
RUN = """
import sys
from pathlib import Path
from lvnas.adapters import read_adapter
from lvnas.pack import PackOptions, pack
print("ready", flush=True)
for line in sys.stdin:
    sources, out = line.rstrip("\\n").split("\\t")
    pid = __import__("os").fork()
    if pid == 0:
        adapters = [read_adapter(path) for path in sorted(Path(sources).iterdir())]
        print("go", __import__("os").getpid(), flush=True)
        pack(adapters, Path(out), PackOptions(layout="group"))
        __import__("os")._exit(0)
    print("end", __import__("os").waitpid(pid, 0)[1], flush=True)
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    for index in range(4):
        make_adapter(folder / f"a{index}", MODULES, seed=index)
    return folder


class Packer:
    """A process that has imported everything and packs in a child of its own for each request."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", RUN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        assert self.line() == ["ready"]

    def line(self) -> list[str]:
        assert self.process.stdout is not None
        return self.process.stdout.readline().split()

    def start(self, sources: Path, out: Path) -> int:
        """The child's process id; it has begun to pack."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{sources}\t{out}\n")
        self.process.stdin.flush()
        return int(self.line()[1])

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)


def kill_at_random_points(sources: Path, tmp_path: Path, points: int) -> None:
    """Kills `points` runs before their end, and checks what each leaves."""
    old = [read_adapter(make_adapter(tmp_path / "old" / "before", MODULES, seed=99))]
    wanted = pack(
        [*old, *(read_adapter(path) for path in sorted(sources.iterdir()))],
        tmp_path / "wanted",
        PackOptions(layout="group"),
    )
    packer, chance, killed, runs = Packer(), random.Random(0), 0, 0
    try:
        start = time.monotonic()
        packer.start(sources, tmp_path / "timing")
        assert packer.line() == ["end", "0"]
        duration = time.monotonic() - start
        while killed < points:
            runs += 1
            assert runs <= 10 * points, (
                f"only {killed} of {runs - 1} runs were still going when they were killed"
            )
            out = tmp_path / f"pack{runs}"
            before = pack(old, out, PackOptions(layout="group"))
            child = packer.start(sources, out)
            time.sleep(chance.uniform(0, duration))
            with contextlib.suppress(ProcessLookupError):  # it was done already
                os.kill(child, signal.SIGKILL)
            was_killed = packer.line() == ["end", "9"]
            killed += was_killed
            duration *= 1.05 if was_killed else 0.8  # other work on the machine makes runs longer and shorter
            found = read_manifest(out)
            assert found == (before if len(found["adapters"]) == 1 else wanted)
            assert verify(out).problems == []
            assert (
                pack(
                    [read_adapter(path) for path in sorted(sources.iterdir())],
                    out,
                    PackOptions(layout="group"),
                )
                == wanted
            )
            verdict = verify(out)
            assert verdict.problems == []
            assert not list(out.glob("adapters/.draft-*"))
    finally:
        packer.close()


def test_kill_at_a_few_points(sources: Path, tmp_path: Path) -> None:
    kill_at_random_points(sources, tmp_path, 5)


@pytest.mark.full
def test_kill_at_fifty_points(sources: Path, tmp_path: Path) -> None:
    kill_at_random_points(sources, tmp_path, 50)


def test_what_a_kill_before_the_first_manifest_leaves(tmp_path: Path) -> None:
    adapter = read_adapter(make_adapter(tmp_path / "a"))
    wanted = pack([adapter], tmp_path / "pack")
    (tmp_path / "pack/manifest.json").rename(tmp_path / "pack/.manifest.json.q1w2")
    (tmp_path / "pack/.provenance.json.x").write_text("{")
    assert pack([adapter], tmp_path / "pack") == wanted
    assert {path.name for path in (tmp_path / "pack").iterdir()} == {
        ".lock",
        "adapters",
        "manifest.json",
        "provenance.json",
    }
