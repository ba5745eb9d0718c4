"""Ragged LoRA on CPU: y[t, slice] += (x[t] A^T) B^T for every token with an adapter, at that adapter's ranks.

Legend: T tokens, D input features, O output features, R rank, S slices, N adapter slots.
Long runs of one adapter are matrix products on views. The rest is one grouped native call for the whole site,
or, without a compiler, matrix products per adapter. Tokens without an adapter are not touched.
"""

import functools
import itertools
from dataclasses import dataclass, field

import numpy as np
import torch

from lvnas_vllm.ragged import native
from lvnas_vllm.ragged.runs import Runs


@dataclass
class SiteWeights:
    """One site's view of the arena."""

    arena: torch.Tensor
    """1-D, all adapters."""
    table: torch.Tensor
    """int64 [S, N, 3] on CPU: offsets of A and B in the arena, and R, by slice and slot; changed in place."""
    inputs: int
    """D."""
    outputs: tuple[int, ...]
    """O of each slice."""
    bounds: np.ndarray = field(init=False)
    """int64 [S + 1]: the columns of y where each slice starts."""
    device_bounds: torch.Tensor = field(init=False)
    """The same as int32 on the table's device, for the Triton kernels."""
    aligned: bool = field(init=False)
    """Whether every O is a multiple of 16, which lets the Triton kernels move 16 bytes at a time."""

    def __post_init__(self) -> None:
        self.bounds = np.array([0, *itertools.accumulate(self.outputs)], dtype=np.int64)
        self.aligned = all(outputs % 16 == 0 for outputs in self.outputs)
        self.device_bounds = torch.tensor(self.bounds, dtype=torch.int32, device=self.table.device)

    @functools.cached_property
    def arguments(self) -> tuple[int, ...]:
        """The native operator's: what stays the same for every step, since arena and table keep their places."""
        sizes = (len(self.outputs), self.table.shape[1], self.inputs)
        return (self.arena.data_ptr(), self.table.data_ptr(), *sizes, self.bounds.ctypes.data)

    def matrices(self, slot: int) -> tuple[torch.Tensor | None, list[tuple[int, int, torch.Tensor]]]:
        """The fused A [sum of R, D] of `slot`, and per slice of rank > 0 (first column, O, B^T [R, O])."""
        entries = self.table[:, slot].tolist()
        total = sum(rank for _, _, rank in entries)
        if not total:
            return None, []
        first = next(a for a, _, rank in entries if rank)
        a = self.arena[first : first + total * self.inputs].view(total, self.inputs)
        return a, [
            (int(column), outputs, self.arena[b : b + rank * outputs].view(rank, outputs))
            for (_, b, rank), outputs, column in zip(entries, self.outputs, self.bounds, strict=False)
            if rank
        ]


def add_lora(y: torch.Tensor, x: torch.Tensor, site: SiteWeights, runs: Runs) -> None:
    """Adds the LoRA output of every token in `runs` to y [T, sum of O], in place; x is [T, D].

    float32 is computed in float32; 16-bit types accumulate in float32.
    """
    if runs.empty:
        return
    if runs.tokens > x.shape[0]:
        raise RuntimeError(f"LoRA mapping of {runs.tokens} tokens met an input of {x.shape[0]}")
    for slot, first, end in runs.long:
        add_run(y[first:end], x[first:end], site, slot)
    if not len(runs.slots):
        return
    operator = native.load().function
    usable = x.stride(-1) == y.stride(-1) == 1 and x.dtype == y.dtype == site.arena.dtype
    if operator is not None and usable and x.dtype in native.DTYPES:
        add_groups(operator, y, x, site, runs)
        return
    for slot, low, high in zip(runs.slots, runs.starts[:-1], runs.starts[1:], strict=True):
        members = torch.from_numpy(runs.members[low:high].astype(np.int64))
        part = y[members]
        add_run(part, x[members], site, int(slot))
        y[members] = part


def add_run(y: torch.Tensor, x: torch.Tensor, site: SiteWeights, slot: int) -> None:
    """The same for tokens that all belong to `slot`."""
    a, slices = site.matrices(slot)
    if a is None:
        return
    h = x.to(a.dtype) @ a.T
    row = 0
    for column, outputs, b in slices:
        part = h[:, row : row + b.shape[0]]
        target = y[:, column : column + outputs]
        if target.dtype == b.dtype:
            target.addmm_(part, b)
        else:
            target += (part @ b).to(target.dtype)
        row += b.shape[0]


def add_groups(operator, y: torch.Tensor, x: torch.Tensor, site: SiteWeights, runs: Runs) -> None:
    """The short runs, all adapters in one native call."""
    operator(
        native.DTYPES[x.dtype],
        x.data_ptr(),
        x.stride(0),
        y.data_ptr(),
        y.stride(0),
        *site.arguments,
        *runs.arguments,
        torch.get_num_threads(),
    )
