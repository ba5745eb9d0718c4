"""The ragged operators against a float32 oracle, over types, token counts, adapter popularity and ranks."""

import itertools

import numpy as np
import pytest
import torch

from lvnas_vllm.ragged import native, torch_ops
from lvnas_vllm.ragged.arena import Arena
from lvnas_vllm.ragged.layout import Site, pack, plan, ranks_of
from lvnas_vllm.ragged.runs import LONG, find_runs, token_slots

SITE = Site("layers.0.qkv_proj", 96, (80, 48, 33))
WIDE = Site("layers.0.wide", 200, (2100, 40, 1100))
"""More columns than one task of the native operator takes, in panels of 64 and a rest."""
SLOTS = 6
TOKENS = (1, 2, 3, 7, 133, 2048)
POPULARITY = ("distinct", "uniform", "zipf", "identical", "none")
RANKS = {
    **{str(rank): [(rank, rank, rank)] for rank in (0, 1, 3, 4, 8, 16, 32, 64, 128)},
    "mixed": [(4, 0, 64), (0, 0, 0), (3, 1, 8), (128, 16, 0), (0, 32, 5)],
}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
NATIVE = native.load()


def adapters(ranks, dtype, site=SITE, seed=0):
    """Per slot the pairs of each slice, and the arena's view of them."""
    random = torch.Generator().manual_seed(seed)
    weights, taken = [], itertools.islice(itertools.cycle(ranks), SLOTS)
    for slot_ranks in taken:
        weights.append(
            [
                (torch.randn(rank, site.inputs, generator=random), torch.randn(out, rank, generator=random))
                if rank
                else None
                for rank, out in zip(slot_ranks, site.outputs, strict=True)
            ]
        )
        weights[-1] = [pair and tuple(matrix.to(dtype) for matrix in pair) for pair in weights[-1]]
    plans = [plan([site], ranks_of([site], [pairs])) for pairs in weights]
    arena = Arena.allocate(sum(elements for _, elements in plans) + 64 * SLOTS, dtype, "cpu", commit=False)
    arena.data.fill_(float("nan"))  # what no adapter owns must not reach any output
    table = torch.zeros(site.slices, SLOTS, 3, dtype=torch.int64)
    for slot, (own, elements) in enumerate(plans):
        start, _ = arena.take(slot, elements)
        pack([site], [weights[slot]], own, arena.region(slot))
        table[:, slot] = own + torch.tensor([start, start, 0])
    return weights, torch_ops.SiteWeights(arena.data, table, site.inputs, site.outputs)


def slots_of(tokens, popularity, seed=0):
    random = np.random.default_rng(seed)
    if popularity == "none":
        return np.full(tokens, -1, np.int32)
    if popularity == "identical":
        return np.full(tokens, 2, np.int32)
    if popularity == "distinct":
        return (np.arange(tokens) % (SLOTS + 1) - 1).astype(np.int32)
    shares = 1 / np.arange(1, SLOTS + 2) if popularity == "zipf" else np.ones(SLOTS + 1)
    lengths = random.choice((1, 5, 31, 32, 70), size=tokens)  # few: oneDNN compiles a kernel per shape
    return np.repeat(random.choice(SLOTS + 1, size=tokens, p=shares / shares.sum()) - 1, lengths)[
        :tokens
    ].astype(np.int32)


def oracle(y, x, weights, slots, site=SITE):
    """y + B (A x) in float32, token by adapter."""
    out = y.float().clone()
    bounds = [0, *itertools.accumulate(site.outputs)]
    for slot, pairs in enumerate(weights):
        members = torch.from_numpy(np.flatnonzero(slots == slot))
        for pair, low, high in zip(pairs, bounds, bounds[1:], strict=False):
            if pair is not None:
                a, b = (matrix.float() for matrix in pair)
                out[members, low:high] += x[members].float() @ a.T @ b.T
    return out


@pytest.fixture(params=["native", "torch"])
def path(request, monkeypatch):
    if request.param == "native":
        if NATIVE.function is None:
            pytest.skip(NATIVE.reason)
    else:
        monkeypatch.setattr(native, "load", lambda: native.Native(None, "pure torch: this test"))
    return request.param


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("ranks", RANKS)
def test_equals_float32_oracle(path, dtype, ranks):
    for tokens, popularity in itertools.product(TOKENS, POPULARITY):
        check(SITE, dtype, ranks, tokens, popularity)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("ranks", ["3", "64", "mixed"])
def test_wide_layers_equal_float32_oracle(path, dtype, ranks):
    for tokens, popularity in itertools.product((1, 7, 300), ("distinct", "zipf", "identical")):
        check(WIDE, dtype, ranks, tokens, popularity)


def check(site, dtype, ranks, tokens, popularity):
    weights, own = adapters(RANKS[ranks], dtype, site)
    random = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, site.inputs, generator=random).to(dtype)
    y = torch.randn(tokens, sum(site.outputs), generator=random).to(dtype)
    slots = slots_of(tokens, popularity)
    wanted = oracle(y, x, weights, slots, site)
    # Each sum's scale, not each element's: cancellation makes single elements arbitrarily small.
    scale = wanted.abs().amax(1, keepdim=True).clamp_min(1)
    untouched = torch.from_numpy(slots < 0)
    for long in (LONG, tokens + 1):  # with matrix products for long runs, and all in the grouped call
        got = y.clone()
        torch_ops.add_lora(got, x, own, find_runs(slots, long))
        error = ((got.float() - wanted).abs() / scale).max()
        assert error < TOLERANCE[dtype], (tokens, popularity, long)
        assert torch.equal(got[untouched], y[untouched])


def test_strided_input_and_output(path):
    weights, site = adapters(RANKS["mixed"], torch.float32)
    wide_x, wide_y = torch.randn(9, SITE.inputs + 5), torch.randn(9, sum(SITE.outputs) + 7)
    slots = slots_of(9, "distinct")
    wanted = oracle(wide_y[:, 3:-4], wide_x[:, 2:-3], weights, slots)
    before = wide_y.clone()
    torch_ops.add_lora(wide_y[:, 3:-4], wide_x[:, 2:-3], site, find_runs(slots))
    torch.testing.assert_close(wide_y[:, 3:-4], wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(wide_y[:, :3], before[:, :3]) and torch.equal(wide_y[:, -4:], before[:, -4:])


def test_nan_and_infinity_pass_through(path):
    _, site = adapters(RANKS["4"], torch.bfloat16)
    y = torch.zeros(2, sum(SITE.outputs), dtype=torch.bfloat16)
    x = torch.ones(2, SITE.inputs, dtype=torch.bfloat16)
    x[0, 5] = float("nan")
    torch_ops.add_lora(y, x, site, find_runs(np.array([1, 2], np.int32)))
    assert y[0].isnan().all() and y[1].isfinite().all()


def test_more_mapped_tokens_than_inputs_is_an_error():
    _, site = adapters(RANKS["4"], torch.float32)
    with pytest.raises(RuntimeError, match="mapping of 3 tokens met an input of 2"):
        torch_ops.add_lora(torch.zeros(2, 161), torch.zeros(2, 96), site, find_runs(np.zeros(3, np.int32)))


def test_runs_cover_each_adapter_token_once():
    for seed, popularity in itertools.product(range(20), POPULARITY):
        slots = slots_of(500, popularity, seed)
        runs = find_runs(slots)
        seen = np.full(500, -1)
        for slot, first, end in runs.long:
            assert end - first >= 32
            seen[first:end] = slot
        for slot, low, high in zip(runs.slots, runs.starts, runs.starts[1:], strict=False):
            assert (seen[runs.members[low:high]] == -1).all()
            seen[runs.members[low:high]] = slot
        assert (seen == slots).all()


def test_token_slots_follow_the_slot_table():
    assert token_slots([7, 0, 3, 3, -1], [None, 3, 7]).tolist() == [2, -1, 1, 1, -1]
    assert token_slots([], [None, None]).tolist() == []
    with pytest.raises(KeyError, match=r"\[5\] are not active"):
        token_slots([3, 5], [None, 3])


def test_without_a_compiler_torch_runs_and_says_why(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "/nonexistent")
    found = native.load.__wrapped__()
    assert found.function is None and "no C++ compiler" in found.reason


def test_broken_compiler_falls_back(monkeypatch, tmp_path):
    monkeypatch.setenv("LVNAS_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    found = native.load.__wrapped__()
    assert found.function is None and found.reason.startswith("pure torch: false failed")
