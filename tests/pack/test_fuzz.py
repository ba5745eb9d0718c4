"""Random adapters, near right and far off: read or refused by name, in bounded time, and nothing is written.

Every input is made from its seed alone; a failure names the seed.
"""

import json
import random
import struct
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from makers import MODULES, make_adapter, make_config, split

from lvnas.adapters import read_adapter
from lvnas.tensorfile import BrokenFile

SLOWEST = 8.0
"""Processor seconds for one input: PATTERN_SECONDS for each of three options, and a little."""
INTEGERS = (-(2**70), -1, 0, 1, 2, 3, 8, 255, 2**31, 2**47, 2**63, 2**64, 2**70)
WORDS = (
    *(
        "",
        "LORA",
        "ADALORA",
        "pissa",
        "eva",
        "corda",
        "loftq",
        "F32",
        "BF16",
        "F64",
        "I64",
        "BOOL",
        "q_proj",
        ".*",
    ),
    *(
        "(",
        "[0-9]{9}{9}",
        r"(x|.|\w)*\d\d",
        "../x",
        "a" * 600,
        "\x00",
        "ü",
        "__metadata__",
        "1e999",
        "all-linear",
    ),
)
FLOATS = (0.0, -1.5, 1e308, 1e-300, float("nan"), float("inf"))
Files = tuple[bytes, bytes]


class Mutator:
    """Changes one thing after another in an adapter that is right."""

    def __init__(self, header: dict[str, Any], data: bytes, config: dict[str, Any]) -> None:
        self.header, self.data, self.config = header, data, config

    def files(self, seed: int) -> Files:
        """Weights and configuration for `seed`."""
        draw = random.Random(seed)
        header, config = self.header, self.config
        if kind := draw.randrange(4):  # 0: only bytes change
            for _ in range(draw.choice((1, 1, 2, 5))):
                header = change(header, draw) if kind & 1 else header
                config = change(config, draw) if kind & 2 else config
        text = json.dumps(header).encode()
        files = [struct.pack("<Q", len(text)) + text + self.data, json.dumps(config).encode()]
        if kind == 0 or draw.random() < 0.1:
            for _ in range(draw.choice((1, 1, 3))):
                which = draw.randrange(2)
                files[which] = change_bytes(files[which], draw)
        return files[0], files[1]


def change(value: Any, draw: random.Random) -> Any:
    """`value` with one part, at any depth, replaced, removed, renamed or copied."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(list(value))
        action = draw.choice(("inside", "inside", "inside", "inside", "remove", "rename", "copy"))
        if action == "inside":
            return value | {key: change(value[key], draw)}
        rest = {other: item for other, item in value.items() if other != key}
        new = draw.choice((*WORDS, *value, f"{key}.weight", str(key).replace("A", "B")))
        return rest if action == "remove" else (value if action == "copy" else rest) | {new: value[key]}
    if isinstance(value, list) and value and draw.random() < 0.6:
        index = draw.randrange(len(value))
        return [*value[:index], change(value[index], draw), *value[index + 1 :]]
    if isinstance(value, int) and not isinstance(value, bool) and draw.random() < 0.6:
        return value + draw.choice((-1, 1, 4, 8, -value, 2**31, 2**63))
    new = (
        None,
        True,
        False,
        [],
        {},
        [[]],
        {"a": {}},
        draw.choice(INTEGERS),
        draw.choice(FLOATS),
        draw.choice(WORDS),
    )
    return draw.choice(new)


def change_bytes(old: bytes, draw: random.Random) -> bytes:
    """`old` with a run of bytes anywhere (more often near the start) replaced, removed or inserted."""
    at = draw.randrange(draw.choice((9, 200, len(old), len(old))))
    new = draw.choice(
        (b"", b"\xff" * 8, b"\0" * 8, b"\x80\x7f", b'"', b"{", b"[" * 2000, draw.randbytes(draw.randrange(9)))
    )
    return old[:at] + new + old[at + draw.choice((0, len(new), 1, 100)) :]


@pytest.fixture(scope="module")
def mutator(tmp_path_factory: pytest.TempPathFactory) -> Mutator:
    folder = make_adapter(tmp_path_factory.mktemp("fuzz") / "adapter")
    return Mutator(*split(folder / "adapter_model.safetensors"), make_config(MODULES))


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """One folder in memory, used again and again: 100,000 on a disk would take longer than the reading."""
    place = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=place) as parent:
        (Path(parent) / "adapter").mkdir()
        yield Path(parent) / "adapter"


def read_all(folder: Path, files: Files) -> str:
    """Reads the adapter and all its values; returns the reason of the refusal, or `read`."""
    for name, content in zip(("adapter_model.safetensors", "adapter_config.json"), files, strict=True):
        (folder / name).write_bytes(content)
    try:
        for module in read_adapter(folder).modules.values():
            a_RD, b_OR = module.factors()
            assert a_RD.shape[0] == b_OR.shape[1] == module.rank
    except BrokenFile as error:
        return error.reason
    return "read"


def fuzz(mutator: Mutator, folder: Path, seeds: range) -> Counter[str]:
    """How often each outcome was seen."""
    seen: Counter[str] = Counter()
    for seed in seeds:
        start = time.thread_time()
        try:
            seen[read_all(folder, mutator.files(seed))] += 1
            assert time.thread_time() - start < SLOWEST
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error!r}") from error
    assert {path.name for path in folder.iterdir()} == {"adapter_model.safetensors", "adapter_config.json"}
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]
    return seen


def test_a_slice_of_the_fuzzing(mutator: Mutator, folder: Path) -> None:
    seen = fuzz(mutator, folder, range(3000))
    assert {"read", "not-json", "size-mismatch", "not-finite"} <= seen.keys()
    assert len(seen) > 25, seen


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_a_hundred_thousand_inputs(mutator: Mutator, folder: Path) -> None:
    seen = fuzz(mutator, folder, range(100_000, 200_000))
    assert len(seen) >= 30, seen
