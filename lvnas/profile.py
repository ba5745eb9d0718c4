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
from lvnas_vllm.ragged.arena import ALIGN, aligned

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
SECONDS = 0.05
"""Spent on each shape and rank, at least."""
MOST_BYTES = 256 << 20
"""Of weights that are kept to measure with: several times a processor's caches."""


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
    step = Step(shapes, max(ranks), adapters, DTYPES[dtype], device)
    pairs = [(shape, rank) for shape in dict.fromkeys(shapes) for rank in ranks]
    seconds: dict[str, list[float]] = {}
    for shape, rank in track(pairs, f"measuring the operators of {base} on {device}"):
        seconds.setdefault(shape_name(shape), []).append(step.seconds(shape, rank))
    drawn = np.random.default_rng(0).choice(ranks, len(shapes)).tolist()
    plan = list(zip(shapes, drawn, strict=True))
    check = {
        "seconds in a row": seconds_of([step.operator(*module) for module in plan], device),
        "sum of the table": sum(seconds[shape_name(shape)][ranks.index(rank)] for shape, rank in plan),
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


class Step:
    """The operators of decode steps, their weights laid one after the other around a buffer.

    A step touches every weight once, so that most come from memory and not from a cache. The buffer is as large as
    the weights of all modules at the highest rank, `MOST_BYTES` at most.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        highest: int,
        adapters: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.shapes, self.adapters = shapes, adapters
        one = max(adapters * self._elements(shape, highest) for shape in shapes)
        whole = adapters * sum(self._elements(shape, highest) for shape in shapes)
        size = max(one, min(whole, MOST_BYTES // dtype.itemsize))
        self.buffer = torch.empty(size + ALIGN, dtype=dtype, device=device).normal_(0, 0.01)
        self.end = 0

    def seconds(self, shape: tuple[int, int], rank: int) -> float:
        """The time of one module's operator in a step in which all modules have this rank."""
        step = self.adapters * sum(self._elements(other, rank) for other in self.shapes)
        one = self.adapters * self._elements(shape, rank)
        copies = min(step, self.buffer.numel() - ALIGN) // one if one else 1
        self.end = 0
        calls = [self.operator(shape, rank) for _ in range(max(1, copies))]
        return seconds_of(calls, self.buffer.device) / len(calls)

    def operator(self, shape: tuple[int, int], rank: int) -> Callable[[], Any]:
        """One shrink and expand: y [T, O] += (x [T, D] A^T) B^T, every token another adapter of `rank`."""
        from lvnas_vllm.ragged.layout import Site, plan
        from lvnas_vllm.ragged.torch_ops import SiteWeights

        inputs, outputs = shape
        own, elements = plan([Site("profiled", inputs, (outputs,))], [[rank]])
        if self.end + elements * self.adapters > self.buffer.numel() - ALIGN:
            self.end = 0
        starts = torch.arange(self.adapters) * elements + self.end
        self.end += elements * self.adapters
        table = own[:, None, :] + starts[None, :, None] * torch.tensor([1, 1, 0])
        device, dtype = self.buffer.device, self.buffer.dtype
        x = torch.randn(self.adapters, inputs, device=device).to(dtype)
        y = torch.zeros(self.adapters, outputs, dtype=dtype, device=device)
        weights = SiteWeights(self.buffer, table.to(device), inputs, (outputs,))
        return _cuda_call(y, x, weights, rank) if device.type == "cuda" else _cpu_call(y, x, weights)

    @staticmethod
    def _elements(shape: tuple[int, int], rank: int) -> int:
        """Of one adapter's module in the serving arena."""
        return sum(aligned(rank * width) for width in shape)


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
    return lambda: add_ragged_lora(y, x, *rest, weights.aligned)


def seconds_of(calls: Sequence[Callable[[], Any]], device: torch.device) -> float:
    """The median time of all `calls` in a row; on CUDA replayed as a graph, without launch gaps."""

    def row() -> None:
        for call in calls:
            call()

    if device.type == "cuda":
        import triton

        return triton.testing.do_bench_cudagraph(row) / 1e3
    return _median_seconds(row)


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
