"""Adapters touch their own requests only, wherever in the model they are."""

import dataclasses

import pytest
import torch
from cases import Case, draw_cases, draw_image
from many_adapters import ADAPTERS
from served import compare


def ids_and_logprobs(output) -> list[tuple[int, float]]:
    answer = output.outputs[0]
    return [
        (token, step[token].logprob) for token, step in zip(answer.token_ids, answer.logprobs, strict=True)
    ]


@pytest.fixture(scope="module")
def image_case() -> Case:
    import random

    return Case("<|begin_of_text|>now <|image|>what?", [draw_image(random.Random(4), 28)], None, 6)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_every_adapter_changes_the_answer(engine, oracle, image_case: Case, adapter: str) -> None:
    """So that parity with an adapter is not parity of two models that both ignore it."""
    base = ids_and_logprobs(engine.generate([image_case])[0])
    case = dataclasses.replace(image_case, adapter=adapter)
    (output,) = engine.generate([case])
    changed = ids_and_logprobs(output)
    assert max(abs(a[1] - b[1]) for a, b in zip(base, changed, strict=True)) > 0.01
    assert compare(oracle, case, output)[0]


@pytest.mark.parametrize("pair", [("vision-1", "vision-2"), ("cross-kv-1", "cross-kv-2")])
def test_adapters_that_differ_in_one_place_change_only_their_own_requests(
    engine, oracle, image_case: Case, pair: tuple[str, str]
) -> None:
    cases = [
        dataclasses.replace(image_case, adapter=name) for name in (pair[0], None, pair[1], pair[0], pair[1])
    ]
    outputs = engine.generate(cases)
    for case, output in zip(cases, outputs, strict=True):
        same, worst = compare(oracle, case, output)
        assert same and worst < 1e-4, (case.adapter, worst)
    firsts = [ids_and_logprobs(output)[0][1] for output in outputs]
    assert len({round(value, 4) for value in firsts}) == 3


@pytest.mark.parametrize("seed", range(3))
def test_text_requests_do_not_see_vision_or_cross_adapters(engine, seed: int) -> None:
    """A text request skips the cross-attention layers whole, so those adapters leave it bit for bit alone."""
    case = next(case for case in draw_cases(seed, 50, [None]) if not case.images)
    plain, vision, cross = (
        ids_and_logprobs(engine.generate([dataclasses.replace(case, adapter=name)])[0])
        for name in (None, "vision-1", "cross-kv-1")
    )
    assert plain == vision == cross


def test_cpu_operators_leave_rows_without_an_adapter_alone() -> None:
    from lvnas_vllm import cpu_lora

    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(7, 6, generator=generator)
    a, b = torch.randn(3, 1, 4, 6, generator=generator), torch.randn(3, 1, 5, 4, generator=generator)
    index = torch.tensor([-1, 2, 0, -1, 2, 1, -1])
    hidden = torch.zeros(7, 4)
    cpu_lora.bgmv_shrink(inputs, a, hidden, index, 0.5)
    start = torch.randn(7, 9, generator=generator)
    output = start.clone()
    cpu_lora.bgmv_expand_slice(hidden, b, output, index, 2, 5)
    for row, adapter in enumerate(index.tolist()):
        wanted = start[row].clone()
        if adapter >= 0:
            wanted[2:7] += b[adapter, 0] @ (a[adapter, 0] @ inputs[row] * 0.5)
        torch.testing.assert_close(output[row], wanted, atol=1e-5, rtol=1e-5)
    assert torch.equal(output[index < 0], start[index < 0])


def test_wrong_token_counts_fail_loudly() -> None:
    from lvnas_vllm import cpu_lora

    with pytest.raises(AssertionError, match="mapping of 2 tokens for 3 tokens"):
        cpu_lora.bgmv_shrink(
            torch.zeros(3, 2), torch.zeros(1, 1, 4, 2), torch.zeros(3, 4), torch.tensor([0, 0])
        )
