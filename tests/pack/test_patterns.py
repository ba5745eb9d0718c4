"""Patterns match as PEFT matches them, whatever form their keys have."""

import random
from pathlib import Path

import pytest
from peft.utils.other import get_pattern_key

from lvnas.adapter_config import Pattern
from lvnas.modules import rank_pattern_key
from lvnas.tensorfile import BrokenFile

MODULES = [
    f"model.{tower}.layers.{layer}.{name}"
    for tower in ("language_model", "vision_model.transformer", "vision_model.global_transformer")
    for layer in (0, 1, 10, 11)
    for name in ("self_attn.q_proj", "mlp.gate_proj", "q_proj", "x.1.q")
]
PIECES = (
    "q_proj",
    r".*\.q_proj",
    "self_attn.q_proj",
    r"layers\.1\.",
    r"layers.1\..*",
    ".*",
    "(q|x)",
    r"\d+",
    "layers.1.x.1.q",
)


@pytest.mark.parametrize("seed", range(200))
def test_the_first_key_that_matches_as_in_peft(seed: int) -> None:
    draw = random.Random(seed)
    keys = {}
    for place in range(draw.randint(1, 8)):
        name = draw.choice(MODULES)
        forms = (
            rank_pattern_key(name),
            name,
            "^" + name,
            name.partition(".")[2],
            name.replace(".", r"\.") + "$",
            name.replace(".", draw.choice((".", "_", r"\.")), 2),
            draw.choice(PIECES),
            draw.choice(PIECES) + draw.choice(PIECES),
        )
        keys[draw.choice(forms)] = place
    pattern = Pattern(Path("x"), "rank_pattern", keys)
    for module in MODULES:
        assert pattern.match(module) == keys.get(get_pattern_key(list(keys), module)), (keys, module)


def test_a_wildcard_dot_is_one() -> None:
    assert Pattern(Path("x"), "rank_pattern", {"a.b": 1}).match("x.aXb") == 1
    assert Pattern(Path("x"), "rank_pattern", {r"a\.b": 1}).match("x.aXb") is None


def test_time_is_counted_over_all_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lvnas.adapter_config.PATTERN_SECONDS", 0.05)
    pattern = Pattern(Path("x"), "rank_pattern", {r"(x|.|\w)*(y|.|\w)*\d\d": 1})
    with pytest.raises(BrokenFile, match="slow-pattern"):
        for _ in range(100_000):
            pattern.match("a.b.c.d.e.f.g.h")
