"""Capacity from a manifest, from a number of bytes, or padded; and the switch itself."""

import json

import pytest

from lvnas.errors import InputError
from lvnas_vllm.ragged import SWITCH, capacity, enable, operator_path
from lvnas_vllm.ragged.layout import Site

SITES = [Site("qkv", 64, (64, 32, 32)), Site("o", 64, (64,))]
PLACES = {"q": (0, 0), "k": (0, 1), "v": (0, 2), "o": (1, 0)}
Q, K, O = 64 + 64, 64 + 32, 64 + 64  # elements per rank  # noqa: E741


def write_pack(folder, *adapters):
    manifest = {"format": "lvnas-pack/1", "adapters": [{"ranks": ranks} for ranks in adapters]}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture(autouse=True)
def no_runtime_adapters(monkeypatch):
    monkeypatch.delenv(capacity.RUNTIME, raising=False)


def choose(slots, padded=9999):
    return capacity.choose(SITES, slots, 2, padded, PLACES.get)


def test_the_largest_adapters_of_the_pack(monkeypatch, tmp_path):
    monkeypatch.delenv(capacity.MEMORY, raising=False)
    pack = write_pack(tmp_path, {"q": 3, "o": 1}, {"q": 8, "k": 4}, {"q": 1, "elsewhere": 64}, {})
    monkeypatch.setenv(capacity.PACK, str(pack))
    sizes = [3 * Q + O, 8 * Q + 4 * K, Q]
    assert capacity.manifest_sizes(pack, SITES, PLACES.get) == [*sizes, 0]
    assert choose(1).elements == sizes[1]
    assert choose(2).elements == sizes[1] + sizes[0]
    assert choose(9).elements == sum(sizes)
    assert choose(9).reserved
    monkeypatch.setenv(capacity.PACK, str(pack / "manifest.json"))
    assert choose(2).elements == sizes[1] + sizes[0]


def test_the_largest_adapter_in_every_slot_where_adapters_come_and_go(monkeypatch, tmp_path):
    monkeypatch.delenv(capacity.MEMORY, raising=False)
    monkeypatch.setenv(capacity.PACK, str(write_pack(tmp_path, {"q": 8}, {"q": 4})))
    assert choose(2).elements == 12 * Q
    monkeypatch.setenv(capacity.RUNTIME, "True")
    assert choose(2).elements == 16 * Q and choose(3).elements == 24 * Q
    monkeypatch.setenv(capacity.MEMORY, "1MiB")
    assert choose(2).elements == 2**19


def test_bytes_win_when_they_can_hold_the_pack(monkeypatch, tmp_path):
    monkeypatch.setenv(capacity.PACK, str(write_pack(tmp_path, {"q": 8}, {"q": 4})))
    monkeypatch.setenv(capacity.MEMORY, "1MiB")
    assert choose(2).elements == 2**19
    monkeypatch.setenv(capacity.MEMORY, "1000")
    with pytest.raises(
        InputError, match=r"is 1000 bytes, but the 2 largest adapters of .* need 3072; raise it"
    ):
        choose(2)


def test_padded_without_either(monkeypatch):
    monkeypatch.delenv(capacity.PACK, raising=False)
    monkeypatch.delenv(capacity.MEMORY, raising=False)
    assert choose(2).elements == 9999 and not choose(2).reserved


@pytest.mark.parametrize("content", ["[]", "{}", '{"adapters": 3}', '{"adapters": [{"name": "a"}]}', "{"])
def test_what_is_not_a_manifest(monkeypatch, tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    monkeypatch.setenv(capacity.PACK, str(tmp_path))
    with pytest.raises(InputError, match=r"not a pack manifest|not a JSON file"):
        choose(1)


def test_the_switch(monkeypatch):
    monkeypatch.delenv(SWITCH, raising=False)
    assert enable() is False
    monkeypatch.setenv(SWITCH, "yes")
    with pytest.raises(InputError, match=r"LVNAS_RAGGED='yes'; allowed: 0, 1"):
        enable()


def test_the_operator_path_is_said_in_words():
    assert operator_path().startswith(("native: ", "pure torch: ", "Triton"))


def test_the_arena_is_part_of_the_key_of_compiled_code(monkeypatch):
    """vllm.envs: `compile_factors` reads every entry of `environment_variables`."""
    from vllm import envs

    from lvnas_vllm.vllm_internals.ragged import mark_compiled_code

    monkeypatch.setattr(envs, "environment_variables", dict(envs.environment_variables))
    found = [envs.compile_factors()]
    for elements in (1024, 2048):
        mark_compiled_code(elements)
        found.append(envs.compile_factors())
    assert len({str(factors) for factors in found}) == 3
