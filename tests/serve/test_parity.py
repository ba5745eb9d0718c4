"""The served model says what transformers and PEFT say, token for token, whatever is batched with what."""

import pytest
from cases import Case, draw_batches, draw_cases
from conftest import ADAPTERS
from served import compare

TOLERANCE = 1e-4


def check(engine, oracle, cases: list[Case], seed: int) -> None:
    problems = []
    for batch in draw_batches(seed, cases):
        for case, output in zip(batch, engine.generate(batch), strict=True):
            same, worst = compare(oracle, case, output)
            if not same or worst > TOLERANCE:
                problems.append((case.text, [image.size for image in case.images], case.adapter, same, worst))
    assert not problems, f"{len(problems)} of {len(cases)} cases differ: {problems[:5]}"


@pytest.mark.parametrize("seed", range(4))
def test_base_and_adapters_in_mixed_batches(engine, oracle, seed: int) -> None:
    check(engine, oracle, draw_cases(seed, 130, [None, *ADAPTERS]), seed)
