"""Ragged Triton kernels against vLLM's on an NVIDIA GPU: time, bandwidth, exact CUDA-graph replay.

python benchmarks/ragged_lora/gpu_kernels.py --out FILE
One site of the 11B shapes (gate_up: 4096 -> 2 x 14336) for 1..128 active adapters, in a decode step (one token
each) and a prefill step (64 tokens each); mixed ranks and uniform 64 through our kernels, uniform 64 through
vLLM's (its padded form is the same for mixed ranks).
"""

import itertools
from collections.abc import Callable
from pathlib import Path

import click
import torch
import triton
from random_models import draw_ranks
from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_expand, lora_shrink

from lvnas.files import provenance, write_json
from lvnas_vllm.ragged.arena import Arena
from lvnas_vllm.ragged.layout import Site, plan
from lvnas_vllm.ragged.torch_ops import SiteWeights
from lvnas_vllm.ragged.triton_ops import add_ragged_lora

SITE = Site("gate_up", 4096, (14336, 14336))
ACTIVE = (1, 2, 4, 8, 16, 32, 64, 128)
STEPS = {"decode": 1, "prefill": 64}
HIGHEST = 64


def ragged_weights(ranks: list[tuple[int, int]]) -> tuple[SiteWeights, int]:
    """Random adapters of these ranks per slice on the GPU, and their bytes."""
    plans = [plan([SITE], [rank]) for rank in ranks]
    arena = Arena.allocate(sum(elements for _, elements in plans), torch.bfloat16, "cuda", commit=False)
    arena.data.normal_(0, 0.01)
    table = torch.zeros(SITE.slices, len(ranks), 3, dtype=torch.int64)
    for slot, (own, elements) in enumerate(plans):
        start, _ = arena.take(slot, elements)
        table[:, slot] = own + torch.tensor([start, start, 0])
    weights = SiteWeights(arena.data, table.cuda(), SITE.inputs, SITE.outputs)
    return weights, sum(elements for _, elements in plans) * 2


def padded_weights(slots: int) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """vLLM's stacked tensors at rank 64."""
    options = {"dtype": torch.bfloat16, "device": "cuda"}
    a = tuple(torch.randn(slots, 1, HIGHEST, SITE.inputs, **options) * 0.01 for _ in SITE.outputs)
    b = tuple(torch.randn(slots, 1, out, HIGHEST, **options) * 0.01 for out in SITE.outputs)
    return a, b


def metadata(slots: int, tokens: int) -> tuple:
    """vLLM's segments of a step in which each of `slots` adapters has tokens / slots tokens."""
    meta = LoRAKernelMeta.make(slots, tokens, "cuda")
    meta.prepare_tensors((torch.arange(tokens, device="cuda") // (tokens // slots)).to(torch.int32))
    return meta.meta_args(tokens, False)


def ragged_call(weights: SiteWeights, y: torch.Tensor, x: torch.Tensor, segments: tuple):
    rest = (weights.arena, weights.table, weights.device_bounds, *segments[1:])
    rest += (HIGHEST, max(SITE.outputs), weights.aligned)
    return lambda: add_ragged_lora(y, x, *rest)


def stock_call(stacked: tuple, y: torch.Tensor, x: torch.Tensor, segments: tuple):
    h = torch.empty(SITE.slices, x.shape[0], HIGHEST, dtype=torch.float32, device="cuda")

    def call() -> None:
        lora_shrink(x, stacked[0], h, *segments, 1.0)
        lora_expand(h, stacked[1], y, *segments, offset_start=0, add_inputs=True)

    return call


def timed(make: Callable[[], Callable[[], None]], size: int) -> dict[str, float]:
    """Milliseconds of a call, and GB/s of its `size` bytes of weights.

    Calls take turns over copies that the second-level cache cannot hold, as layers do in a model.
    """
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    calls = itertools.cycle([make() for _ in range(1 + 2 * cache // size)])
    milliseconds = triton.testing.do_bench_cudagraph(lambda: next(calls)())
    return {"ms": milliseconds, "GB/s": size / milliseconds / 1e6}


def replay_is_exact(weights: SiteWeights, x: torch.Tensor, segments: tuple) -> bool:
    """Whether a captured graph follows the table: exchanged adapters, same graph, results of an eager call."""
    y = torch.zeros(x.shape[0], sum(SITE.outputs), dtype=x.dtype, device="cuda")
    call = ragged_call(weights, y, x, segments)
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    same = True
    for order in (slice(None), torch.arange(weights.table.shape[1] - 1, -1, -1, device="cuda")):
        weights.table.copy_(weights.table[:, order].clone())
        y.zero_()
        call()
        eager = y.clone()
        y.zero_()
        graph.replay()
        same &= torch.equal(eager, y)
    return bool(same)


def measure(step: str, active: int, ranks: Path | None) -> dict:
    tokens = active * STEPS[step]
    x = torch.randn(tokens, SITE.inputs, dtype=torch.bfloat16, device="cuda")
    y = torch.zeros(tokens, sum(SITE.outputs), dtype=torch.bfloat16, device="cuda")
    segments = metadata(active, tokens)
    drawn = [tuple(draw_ranks(SITE.slices, seed, ranks)) for seed in range(active)]
    if max(map(max, drawn)) > HIGHEST:
        raise click.ClickException(f"{ranks} has a rank above {HIGHEST}")
    cases = {"ragged mixed": drawn, "ragged u64": [(HIGHEST,) * SITE.slices] * active}
    row: dict = {"step": step, "active": active}
    for name, case in cases.items():
        weights, size = ragged_weights(case)
        row[name] = timed(lambda case=case: ragged_call(ragged_weights(case)[0], y, x, segments), size)
        row[f"{name} replay exact"] = replay_is_exact(weights, x, segments)
    row["stock u64"] = timed(lambda: stock_call(padded_weights(active), y, x, segments), size)
    return row


@click.command()
@click.option("--ranks", type=click.Path(path_type=Path), help="JSON of ranks to draw from.")
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(ranks, out):
    if not torch.cuda.is_available():
        raise click.ClickException("no CUDA device: this benchmark needs an NVIDIA GPU")
    device = torch.cuda.get_device_properties(0)
    rows = []
    for step in STEPS:
        for active in ACTIVE:
            rows.append(measure(step, active, ranks))
            shown = {name: value for name, value in rows[-1].items() if name not in ("step", "active")}
            print(step, active, shown, flush=True)
    # Bandwidth limit: a plain copy of 1 GiB, read and written.
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    copy = triton.testing.do_bench(lambda: source.clone())
    facts = {"device": device.name, "copy GB/s": 2 * 2**30 / copy / 1e6}
    write_json(out, {"rows": rows, **facts, "provenance": provenance()})


if __name__ == "__main__":
    main()
