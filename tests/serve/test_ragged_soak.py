"""A soak: 2,000 random loads, unloads and requests with random ranks; each adapter has a canary answer."""

import json
import random
from pathlib import Path

import pytest
import torch
from ragged_models import adapter, llama, run_job

CANARY, TOKENS, ADAPTERS = [5, 17, 99, 3], 4, 12


def operations(seed: int, count: int, names: list[str]) -> list:
    """Loads and unloads, and requests for several adapters at once, base requests among them."""
    draw, steps = random.Random(seed), []
    for _ in range(count):
        kind = draw.random()
        if kind < 0.25:
            steps.append(["load", draw.choice(names)])
        elif kind < 0.5:
            steps.append(["unload", draw.choice(names)])
        else:
            chosen = [draw.choice([None, *names]) for _ in range(draw.randint(1, 6))]
            steps.append(["generate", [[CANARY, name] for name in chosen], TOKENS])
    return steps


@pytest.mark.full
def test_no_wrong_answer_and_nothing_left(tmp_path: Path) -> None:
    base = llama(tmp_path / "llama")
    ranks = (1, 2, 3, 5, 8, 16, 24, 32)
    draw = random.Random(0)
    adapters = {
        f"a{i}": adapter(base, tmp_path / f"a{i}", i, ranks, share=draw.uniform(0.1, 1))
        for i in range(ADAPTERS)
    }
    engine = {
        "model": str(base),
        "enable_lora": True,
        "max_lora_rank": 32,
        "max_loras": 4,
        "max_cpu_loras": 6,
    }
    engine |= {"max_model_len": 64, "max_num_seqs": 8}
    alone = [["generate", [[CANARY, name]], TOKENS] for name in (None, *adapters)]
    steps = operations(1, 2000, list(adapters))
    last = [["unload", name] for name in adapters]
    results, _ = run_job(tmp_path / "job", True, [*alone, *steps, *last, ["state"]], adapters, **engine)
    canaries = {name: one[0][0] for name, one in zip((None, *adapters), results, strict=False)}
    assert len({tuple(ids) for ids in canaries.values()}) > ADAPTERS // 2, "canaries must tell adapters apart"
    asked = 0
    for step, result in zip(steps, results[len(alone) :], strict=False):
        if step[0] == "generate":
            for (_, name), (ids, _) in zip(step[1], result, strict=True):
                assert ids == canaries[name], (name, step)
                asked += 1
        else:
            assert isinstance(result, bool), (step, result)
    assert asked > 1000
    state = results[-1]
    assert state["used"] == state["table"] == 0 and state["admitted"] == state["active"] == []


def test_manager_under_random_operations_keeps_every_resident_exact(tmp_path: Path) -> None:
    """The same operations on the arena and ledger alone, with the weights read back bit by bit: fast, in CI."""
    from lvnas_vllm.ragged.arena import Arena, Ledger
    from lvnas_vllm.ragged.layout import Site, pack, plan, ranks_of
    from lvnas_vllm.ragged.torch_ops import SiteWeights

    sites = [
        Site("qkv", 64, (64, 32, 32)),
        Site("o", 64, (64,)),
        Site("up", 64, (96, 96)),
        Site("down", 96, (64,)),
    ]
    draw, generator = random.Random(3), torch.Generator().manual_seed(3)
    arena = Arena.allocate(40_000, torch.bfloat16, "cpu", commit=True)
    ledger, resident, tables = Ledger(arena.capacity, 64), {}, {}
    refused = loaded = moves = 0
    for step in range(1, 2001):
        if resident and draw.random() < 0.45:
            gone = draw.choice(sorted(resident))
            arena.give(gone), ledger.forget(gone), resident.pop(gone), tables.pop(gone)
        else:
            weights = [
                [
                    (
                        torch.randn(rank, site.inputs, generator=generator),
                        torch.randn(out, rank, generator=generator),
                    )
                    if (rank := draw.choice((0, 1, 3, 8, 17, 32)))
                    else None
                    for out in site.outputs
                ]
                for site in sites
            ]
            table, elements = plan(sites, ranks_of(sites, weights))
            try:
                ledger.admit(step, elements, 2)
            except ValueError:
                refused += 1
                continue
            _, moved = arena.take(step, elements)
            pack(sites, weights, table, arena.region(step))
            resident[step], tables[step] = weights, table
            loaded, moves = loaded + 1, moves + len(moved)
        if step % 50 == 0:
            for one, weights in resident.items():
                row, offset = 0, torch.tensor([arena.regions[one][0]] * 2 + [0])
                for site, own in zip(sites, weights, strict=True):
                    rows = (tables[one][row : row + site.slices] + offset).unsqueeze(1)
                    a, slices = SiteWeights(arena.data, rows, site.inputs, site.outputs).matrices(0)
                    row += site.slices
                    kept = [pair for pair in own if pair is not None]
                    assert len(slices) == len(kept)
                    if kept:
                        assert torch.equal(a, torch.cat([pair[0] for pair in kept]).bfloat16())
                    for (_, _, b), pair in zip(slices, kept, strict=True):
                        assert torch.equal(b, pair[1].T.bfloat16())
    assert loaded > 500 and refused > 50 and moves > 50, json.dumps([loaded, refused, moves])
    for one in list(resident):
        arena.give(one)
        ledger.forget(one)
    assert arena.used == 0 and not ledger.sizes
