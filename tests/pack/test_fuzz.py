"""Random adapters, near right and far off: read or refused by name, in bounded time, and nothing is written."""

import json
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from makers import MODULES, make_adapter, make_config, split

from lvnas.adapters import read_adapter
from lvnas.tensorfile import BrokenFile

SLOWEST = 12.0
"""Seconds for one input: PATTERN_SECONDS and a little."""
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=12),
    st.lists(st.integers(-5, 2**40), max_size=4),
    st.dictionaries(st.text(max_size=6), st.integers(), max_size=3),
    st.sampled_from(["LORA", "ADALORA", "pissa", "eva", "F32", "BF16", "I64", "q_proj", ".*", "(", "[0-9]{9}{9}"]),
)  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], bytes, dict[str, Any]]:
    """Header, data and configuration of an adapter that is right."""
    folder = make_adapter(tmp_path_factory.mktemp("fuzz") / "adapter")
    header, data = split(folder / "adapter_model.safetensors")
    return header, data, make_config(MODULES)


@pytest.fixture(scope="module")
def target() -> Any:
    """One folder in memory, used again and again: 100,000 folders on a disk would take longer than the reading."""
    place = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=place) as folder:
        adapter = Path(folder) / "adapter"
        adapter.mkdir()
        yield adapter


def attempt(folder: Path, weights: bytes, config: bytes) -> str:
    """Reads the adapter and all its values; returns the reason of the refusal, or `read`."""
    (folder / "adapter_model.safetensors").write_bytes(weights)
    (folder / "adapter_config.json").write_bytes(config)
    start = time.monotonic()
    try:
        for module in read_adapter(folder).modules.values():
            a_RD, b_OR = module.factors()
            assert a_RD.shape[0] == b_OR.shape[1] == module.rank
        return "read"
    except BrokenFile as error:
        assert "\n" not in str(error).replace(str(folder), "")
        return error.reason
    finally:
        assert time.monotonic() - start < SLOWEST
        assert {path.name for path in folder.iterdir()} == {
            "adapter_model.safetensors",
            "adapter_config.json",
        }


def encode(header: Any, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def change(value: Any, draw: Callable[..., Any]) -> Any:
    """`value` with one part, at any depth, replaced, removed or copied elsewhere."""
    if isinstance(value, dict) and value and draw(st.integers(0, 9)):
        key = draw(st.sampled_from(sorted(value)))
        action = draw(st.sampled_from(["inside", "inside", "inside", "remove", "rename", "copy"]))
        if action == "inside":
            return value | {key: change(value[key], draw)}
        rest = {other: item for other, item in value.items() if other != key}
        if action == "remove":
            return rest
        new = draw(st.one_of(st.text(max_size=20), st.sampled_from(sorted(value))))
        return (value if action == "copy" else rest) | {new: value[key]}
    if isinstance(value, list) and value and draw(st.booleans()):
        index = draw(st.integers(0, len(value) - 1))
        return [*value[:index], change(value[index], draw), *value[index + 1 :]]
    if isinstance(value, int) and not isinstance(value, bool) and draw(st.booleans()):
        return value + draw(st.sampled_from([-1, 1, 8, 2**31, 2**63]))
    return draw(VALUES)


def fuzz(whole: tuple[dict[str, Any], bytes, dict[str, Any]], folder: Path, examples: int) -> set[str]:
    header, data, config = whole
    seen: set[str] = set()
    options = settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
    )

    @options
    @given(st.data())
    def structure(draws: st.DataObject) -> None:
        """The JSON stays JSON; its content changes."""
        kind = draws.draw(st.sampled_from(["header", "config", "both"]))
        new_header = change(header, draws.draw) if kind != "config" else header
        new_config = change(config, draws.draw) if kind != "header" else config
        cut = draws.draw(st.sampled_from([0, 0, 0, 1, 4, 400]))
        seen.add(
            attempt(folder, encode(new_header, data[: len(data) - cut]), json.dumps(new_config).encode())
        )

    @options
    @given(st.integers(0, 10**9), st.binary(max_size=24), st.booleans(), st.integers(0, 16))
    @example(position=0, new=b"\xff" * 8, in_weights=True, removed=8)
    def octets(position: int, new: bytes, in_weights: bool, removed: int) -> None:
        """A run of bytes anywhere in either file is replaced."""
        files = [encode(header, data), json.dumps(config).encode()]
        old = files[0] if in_weights else files[1]
        at = position % (len(old) if position % 3 else min(len(old), 2000))
        files[0 if in_weights else 1] = old[:at] + new + old[at + removed :]
        seen.add(attempt(folder, *files))

    structure()
    octets()
    return seen


def test_a_slice_of_the_fuzzing(whole: Any, target: Path) -> None:
    seen = fuzz(whole, target, 750)
    assert {"read", "not-json", "size-mismatch"} <= seen
    assert len(seen) > 20, seen


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_a_hundred_thousand_inputs(whole: Any, target: Path) -> None:
    assert len(fuzz(whole, target, 50_000)) > 30
