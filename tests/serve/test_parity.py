"""The served model says what transformers and PEFT say, token for token, whatever is batched with what.

LVNAS_TEST_DTYPE=bfloat16 (or float16) runs the suite in that precision, against the same float32 oracle; where
vLLM is a CUDA build it runs on the GPU.
"""

import os
import statistics
import subprocess
import sys

import pytest
from cases import Case, draw_batches, draw_cases
from many_adapters import ADAPTERS, DTYPE
from served import compare

TOLERANCES = {"float32": (1e-4, 1e-4), "float16": (0.01, 0.03), "bfloat16": (0.05, 0.2)}
"""Per precision, the mean over requests and the largest of a request's largest difference of log probabilities."""


def check(engine, oracle, cases: list[Case], seed: int) -> None:
    mean, largest = TOLERANCES[DTYPE]
    problems, differences = [], []
    for batch in draw_batches(seed, cases):
        for case, output in zip(batch, engine.generate(batch), strict=True):
            same, worst = compare(oracle, case, output)
            differences.append(worst)
            if worst > largest or (DTYPE == "float32" and not same):
                problems.append((case.text, [image.size for image in case.images], case.adapter, same, worst))
    print(f"{DTYPE}: mean {statistics.mean(differences):.2g}, largest {max(differences):.2g}")
    assert not problems, f"{len(problems)} of {len(cases)} cases differ: {problems[:5]}"
    assert statistics.mean(differences) <= mean


@pytest.mark.parametrize("seed", range(4))
def test_base_and_adapters_in_mixed_batches(engine, oracle, seed: int) -> None:
    check(engine, oracle, draw_cases(seed, 130, [None, *ADAPTERS]), seed)


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_suite_in_half_precision(dtype: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", __file__, "-m", "not full"],
        env={**os.environ, "LVNAS_TEST_DTYPE": dtype},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
