"""`lvnas profile`: what a rank costs on this device: time of the serving operators, bytes of a slot.

Legend: T tokens, D input features, O output features, R rank, N adapters.

The operators are those that serve ragged packs (`lvnas_vllm.ragged`): one shrink and expand per module. A decode
step of N users with an adapter each is measured, T = N, all N at the same rank; in such a step a plan takes
about the sum of its modules' times. In vLLM q, k, v and gate, up share a call, so that the sum is an upper bound.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lvnas import files
from lvnas.costs import SHARED, UNITS, shape_costs, shape_name, write_table
from lvnas.errors import InputError, unknown
from lvnas.modules import find_targets
from lvnas.progress import track
from lvnas.supernet import check_space

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
SECONDS = 0.05
"""Processor time spent on each shape and rank, at least."""


def profile_base(
    base: str,
    out: Path,
    *,
    targets: str = "all",
    ranks: Iterable[int] = (4, 8, 16, 32, 64),
    adapters: int = 8,
    dtype: str = "bfloat16",
) -> dict[str, Any]:
    """Measures every shape of the target modules of `base` at every rank, and writes the cost table `out`.

    Returns:
        The file's path, how many shapes and modules, the seconds of the highest rank in all modules, and the
        measured time of a random plan beside the table's.

    Raises:
        InputError: an unknown base, target or type, or no adapters.
    """
    from lvnas.bases import meta_model

    ranks = check_space(ranks)
    if adapters < 1:
        raise InputError(f"{adapters} adapters; a step needs at least one")
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    modules = find_targets(meta_model(base), targets).values()
    shapes = [(module.in_features, module.out_features) for module in modules]
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    pairs = [(shape, rank) for shape in dict.fromkeys(shapes) for rank in ranks]
    seconds: dict[str, list[float]] = {}
    for shape, rank in track(pairs, f"measuring the operators of {base} on {device}"):
        call = operator(shape, rank, adapters, DTYPES[dtype], device)
        seconds.setdefault(shape_name(shape), []).append(seconds_of([call], device))
    drawn = np.random.default_rng(0).integers(len(ranks), size=len(shapes))
    calls = [
        operator(shape, ranks[k], adapters, DTYPES[dtype], device)
        for shape, k in zip(shapes, drawn, strict=True)
    ]
    check = {
        "seconds in a row": seconds_of(calls, device),
        "sum of the table": sum(seconds[shape_name(s)][k] for s, k in zip(shapes, drawn, strict=True)),
    }
    tables: dict[str, Any] = {
        name: {
            "unit": unit,
            "shared": name in SHARED,
            "costs": {shape_name(shape): shape_costs(name, shape, ranks) for shape in shapes},
        }
        for name, unit in UNITS.items()
        if name != "latency"
    }
    tables["latency"] = {"unit": UNITS["latency"], "shared": False, "costs": seconds}
    settings = {"base": base, "targets": targets, "adapters": adapters, "dtype": dtype, "device": str(device)}
    facts = {"threads": torch.get_num_threads(), "operators": operators(device)}
    made = files.provenance(**facts)
    write_table(out, ranks, tables, settings=settings, random_plan=check, provenance=made)
    return {
        "costs": str(out),
        "shapes": len(seconds),
        "modules": len(shapes),
        "seconds_at_highest": sum(seconds[shape_name(shape)][-1] for shape in shapes),
        "random_plan": check,
    }


def operators(device: torch.device) -> str:
    """Which operators run on `device`, in words."""
    from lvnas_vllm.ragged import native

    return "Triton kernels" if device.type == "cuda" else native.load().reason


def operator(
    shape: tuple[int, int], rank: int, adapters: int, dtype: torch.dtype, device: torch.device
) -> Callable[[], Any]:
    """One shrink and expand to call: y [T, O] += (x [T, D] A^T) B^T, every token another adapter of `rank`."""
    from lvnas_vllm.ragged.arena import Arena
    from lvnas_vllm.ragged.layout import Site, plan
    from lvnas_vllm.ragged.torch_ops import SiteWeights

    inputs, outputs = shape
    own, elements = plan([Site("profiled", inputs, (outputs,))], [[rank]])
    arena = Arena.allocate(elements * adapters, dtype, device, commit=False)
    arena.data.normal_(0, 0.01)
    table = torch.zeros(1, adapters, 3, dtype=torch.int64)
    for slot in range(adapters):
        start, _ = arena.take(slot, elements)
        table[:, slot] = own + torch.tensor([start, start, 0])
    x = torch.randn(adapters, inputs, device=device).to(dtype)
    y = torch.zeros(adapters, outputs, dtype=dtype, device=device)
    weights = SiteWeights(arena.data, table.to(device), inputs, (outputs,))
    return _cuda_call(y, x, weights, rank) if device.type == "cuda" else _cpu_call(y, x, weights)


def _cpu_call(y: torch.Tensor, x: torch.Tensor, weights: Any) -> Callable[[], Any]:
    from lvnas_vllm.ragged.runs import find_runs
    from lvnas_vllm.ragged.torch_ops import add_lora

    runs = find_runs(np.arange(len(x), dtype=np.int32))
    return lambda: add_lora(y, x, weights, runs)


def _cuda_call(y: torch.Tensor, x: torch.Tensor, weights: Any, rank: int) -> Callable[[], Any]:
    from vllm.lora.ops.triton_ops import LoRAKernelMeta

    from lvnas_vllm.ragged.triton_ops import add_ragged_lora

    meta = LoRAKernelMeta.make(len(x), len(x), x.device)
    meta.prepare_tensors(torch.arange(len(x), device=x.device, dtype=torch.int32))
    segments = meta.meta_args(len(x), False)[1:]
    rest = (weights.arena, weights.table, weights.device_bounds, *segments, max(rank, 1), weights.outputs[0])
    return lambda: add_ragged_lora(y, x, *rest)


def seconds_of(calls: Sequence[Callable[[], Any]], device: torch.device) -> float:
    """The median time of all `calls` in a row; on CUDA replayed as a graph, without launch gaps."""

    def step() -> None:
        for call in calls:
            call()

    if device.type == "cuda":
        import triton

        return triton.testing.do_bench_cudagraph(step) / 1e3
    return _median_seconds(step)


def _median_seconds(call: Callable[[], Any]) -> float:
    """The median over batches of calls; each batch is long enough for the clock."""
    start = time.perf_counter()
    call()
    call()
    each = (time.perf_counter() - start) / 2
    batch = max(1, round(1e-3 / max(each, 1e-7)))
    taken: list[float] = []
    end = time.perf_counter() + SECONDS
    while len(taken) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        for _ in range(batch):
            call()
        taken.append((time.perf_counter() - start) / batch)
    return statistics.median(taken)
