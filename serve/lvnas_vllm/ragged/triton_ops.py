"""Ragged LoRA on GPUs: a shrink and an expand kernel over token segments, and the custom op that runs both.

Legend: T tokens, D input features, O output features, R rank, S slices, N adapter slots.
Both kernels read each adapter's rank and offsets from the site's table, so tables and arena keep their address
and CUDA graphs replay any adapters. Blocks past a rank, past an adapter's tokens or past a slice return at once.
Split partial sums go to their own rows of h and are added in the expand, in a fixed order: no atomics, and a
replay is exact.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

BLOCK_R = 16
"""Ranks per block: the smallest that a tensor core takes."""


@dataclass(frozen=True)
class Tuning:
    """Block sizes of both kernels."""

    tokens: int
    inputs: int
    splits: int
    """How many blocks share one sum over D."""
    outputs: int
    warps: int
    stages: int


DECODE = Tuning(tokens=16, inputs=256, splits=8, outputs=128, warps=4, stages=3)
PREFILL = Tuning(tokens=64, inputs=64, splits=1, outputs=128, warps=4, stages=3)
DECODE_TOKENS = 256
"""Steps of at most so many tokens are tuned as decodes."""


def tuning(tokens: int, inputs: int) -> Tuning:
    """The block sizes for a step of `tokens` tokens and D = `inputs`."""
    chosen = DECODE if tokens <= DECODE_TOKENS else PREFILL
    splits = min(chosen.splits, triton.cdiv(inputs, chosen.inputs))
    return Tuning(chosen.tokens, chosen.inputs, splits, chosen.outputs, chosen.warps, chosen.stages)


@triton.jit
def segment_tokens(members, counts, starts, index, block, T, BLOCK_T: tl.constexpr):
    """The tokens [BLOCK_T] of a block of segment `index`, and which of them exist.

    Prompt log-probabilities come with fewer rows than their mapping has tokens.
    """
    offsets = block * BLOCK_T + tl.arange(0, BLOCK_T)
    exists = offsets < tl.load(counts + index)
    tokens = tl.load(members + tl.load(starts + index) + offsets, mask=exists, other=0).to(tl.int64)
    return tokens, exists & (tokens < T)


# A variant for T a multiple of 16 and one for the rest would be compiled while requests wait.
@triton.jit(do_not_specialize=["T"])
def shrink_kernel(
    x, arena, table, h, members, counts, starts, active,
    T, D, slots, max_rank, x_stride,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
    SPLITS: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    """h[split, slice, t, r] = sum over the split's part of D of x[t, d] A[r, d]."""
    block, slice_index, index = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot = tl.load(active + index)
    if slot < 0:
        return
    split = block % SPLITS
    block //= SPLITS
    rank_blocks = tl.cdiv(max_rank, BLOCK_R)
    rank_block, token_block = block % rank_blocks, block // rank_blocks
    entry = table + (slice_index * slots + slot) * 3
    rank = tl.load(entry + 2)
    if rank_block * BLOCK_R >= rank:
        return
    if token_block * BLOCK_T >= tl.load(counts + index):
        return
    tokens, exists = segment_tokens(members, counts, starts, index, token_block, T, BLOCK_T)
    rows = rank_block * BLOCK_R + tl.arange(0, BLOCK_R)
    a = arena + tl.multiple_of(tl.load(entry), 16)
    total = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
    for first in range(split * BLOCK_D, D, SPLITS * BLOCK_D):
        columns = first + tl.arange(0, BLOCK_D)
        x_tile = tl.load(
            x + tokens[:, None] * x_stride + columns[None, :],
            mask=exists[:, None] & (columns < D)[None, :], other=0.0,
        )  # fmt: skip
        a_tile = tl.load(
            a + rows[None, :].to(tl.int64) * D + columns[:, None],
            mask=(rows < rank)[None, :] & (columns < D)[:, None], other=0.0,
        )  # fmt: skip
        total = tl.dot(x_tile, a_tile, total, input_precision="ieee" if IEEE else "tf32")
    place = ((split * tl.num_programs(1) + slice_index) * T + tokens) * max_rank
    tl.store(h + place[:, None] + rows[None, :], total, mask=exists[:, None] & (rows < rank)[None, :])


@triton.jit(do_not_specialize=["T", "out_blocks"])
def expand_kernel(
    y, arena, table, h, bounds, members, counts, starts, active,
    T, slots, max_rank, y_stride, out_blocks,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr,
    SPLITS: tl.constexpr, ALIGNED: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    """y[t, columns of slice] += sum over r of (sum over splits of h[split, slice, t, r]) B[r, column]."""
    block, slice_index, index = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot = tl.load(active + index)
    if slot < 0:
        return
    out_block, token_block = block % out_blocks, block // out_blocks
    entry = table + (slice_index * slots + slot) * 3
    rank = tl.load(entry + 2)
    if rank == 0:
        return
    if token_block * BLOCK_T >= tl.load(counts + index):
        return
    low = tl.load(bounds + slice_index)
    outputs = tl.load(bounds + slice_index + 1) - low
    if ALIGNED:  # 16 bytes of B and y at a time
        low, outputs = tl.multiple_of(low, 16), tl.multiple_of(outputs, 16)
    if out_block * BLOCK_O >= outputs:
        return
    tokens, exists = segment_tokens(members, counts, starts, index, token_block, T, BLOCK_T)
    columns = out_block * BLOCK_O + tl.arange(0, BLOCK_O)
    b = arena + tl.multiple_of(tl.load(entry + 1), 16)
    total = tl.zeros((BLOCK_T, BLOCK_O), dtype=tl.float32)
    for first in range(0, rank, BLOCK_R):
        rows = first + tl.arange(0, BLOCK_R)
        h_mask = exists[:, None] & (rows < rank)[None, :]
        h_tile = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
        for split in tl.static_range(SPLITS):
            place = ((split * tl.num_programs(1) + slice_index) * T + tokens) * max_rank
            h_tile += tl.load(h + place[:, None] + rows[None, :], mask=h_mask, other=0.0)
        b_tile = tl.load(
            b + rows[:, None].to(tl.int64) * outputs + columns[None, :],
            mask=(rows < rank)[:, None] & (columns < outputs)[None, :], other=0.0,
        )  # fmt: skip
        total = tl.dot(h_tile.to(b_tile.dtype), b_tile, total, input_precision="ieee" if IEEE else "tf32")
    place = y + tokens[:, None] * y_stride + (low + columns)[None, :]
    mask = exists[:, None] & (columns < outputs)[None, :]
    total += tl.load(place, mask=mask, other=0.0).to(tl.float32)
    tl.store(place, total.to(y.dtype.element_ty), mask=mask)


@torch.library.custom_op("lvnas::add_ragged_lora", mutates_args=("y",))
def add_ragged_lora(
    y: torch.Tensor,
    x: torch.Tensor,
    arena: torch.Tensor,
    table: torch.Tensor,
    bounds: torch.Tensor,
    members: torch.Tensor,
    counts: torch.Tensor,
    starts: torch.Tensor,
    active: torch.Tensor,
    no_lora: torch.Tensor,
    segments: torch.Tensor,
    max_rank: int,
    widest: int,
    aligned: bool,
) -> None:
    """y[t, slice] += (x[t] A^T) B^T for every token with an adapter, in place.

    Args:
        y: [T, >= sum of O]; x: [T, D]; arena: 1-D in x's type.
        table: int64 [S, N, 3], offsets of A and B in the arena, and R, per slice and slot.
        bounds: int32 [S + 1], columns of y where each slice starts.
        members: int32 [T], tokens by segment; counts, starts: int32, each segment's tokens and first member.
        active: int32, each segment's slot, below 0 for none.
        no_lora: bool [1] on CPU, whether no token has an adapter; segments: int32 [1] on CPU, how many to launch.
        max_rank: the highest R that can occur; widest: the largest O; aligned: every O is a multiple of 16.
    """
    if no_lora.item() or not x.shape[0]:
        return
    assert x.stride(1) == y.stride(1) == 1
    tokens, inputs = x.shape
    slices, slots, _ = table.shape
    chosen, launched = tuning(tokens, inputs), int(segments.item())
    h = torch.empty(chosen.splits, slices, tokens, max_rank, dtype=torch.float32, device=x.device)
    segment = (members, counts, starts, active)
    blocks = triton.cdiv(tokens, chosen.tokens)
    ieee = x.dtype == torch.float32
    launch = {"num_warps": chosen.warps, "num_stages": chosen.stages}
    shrink_grid = (chosen.splits * blocks * triton.cdiv(max_rank, BLOCK_R), slices, launched)
    shrink_kernel[shrink_grid](
        *(x, arena, table, h, *segment, tokens, inputs, slots, max_rank, x.stride(0)),
        *(chosen.tokens, BLOCK_R, chosen.inputs, chosen.splits, ieee),
        **launch,
    )
    out_blocks = triton.cdiv(widest, chosen.outputs)
    expand_kernel[(blocks * out_blocks, slices, launched)](
        *(y, arena, table, h, bounds, *segment, tokens, slots, max_rank, y.stride(0), out_blocks),
        *(chosen.tokens, BLOCK_R, chosen.outputs, chosen.splits, aligned, ieee),
        **launch,
    )


@add_ragged_lora.register_fake
def _(
    y, x, arena, table, bounds, members, counts, starts, active, no_lora, segments, max_rank, widest, aligned
):
    return None
