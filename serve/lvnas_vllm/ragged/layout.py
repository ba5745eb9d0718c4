"""Where an adapter's matrices lie in its region.

Legend: T tokens, D input features, O output features, R rank, S slices of a site, N adapter slots.
A site is one layer that takes LoRA; a packed one (qkv, gate_up) has one slice per packed projection, each
with its own rank. Per site, the A rows of all slices are adjacent ([R_0 + R_1 + ..., D]: one fused shrink);
then each slice's B, transposed ([R, O]: the expand streams whole rows at any rank).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lvnas_vllm.ragged.arena import aligned

Pair = tuple[torch.Tensor, torch.Tensor]
"""One slice's weights: A [R, D] and B [O, R], the scaling folded into B."""


@dataclass(frozen=True)
class Site:
    """One layer that takes LoRA."""

    name: str
    inputs: int
    """D."""
    outputs: tuple[int, ...]
    """O of each slice."""

    @property
    def slices(self) -> int:
        return len(self.outputs)


@dataclass
class Packed:
    """One adapter's weights in the arena's layout."""

    table: torch.Tensor
    """int64 [slices of all sites, 3]: A's offset and B's offset in the adapter's region (elements), and R."""
    weights: torch.Tensor
    """1-D, the adapter's region."""

    @property
    def elements(self) -> int:
        return self.weights.numel()


def plan(sites: Sequence[Site], ranks: Sequence[Sequence[int]]) -> tuple[torch.Tensor, int]:
    """The table of an adapter with `ranks` per site and slice, and the elements of its region."""
    rows, end = [], 0
    for site, site_ranks in zip(sites, ranks, strict=True):
        if not any(site_ranks):
            rows += [(0, 0, 0)] * site.slices
            continue
        starts = []
        for rank in site_ranks:
            starts.append(end)
            end += rank * site.inputs
        end = aligned(end)
        for start, rank, outputs in zip(starts, site_ranks, site.outputs, strict=True):
            rows.append((start, end, rank))
            end = aligned(end + rank * outputs)
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 3), end


def pack(
    sites: Sequence[Site],
    weights: Sequence[Sequence[Pair | None] | None],
    dtype: torch.dtype,
    pin: bool = False,
) -> Packed:
    """Packs an adapter: `weights` holds per site its slices' pairs, None where a slice or a site has none.

    Raises:
        ValueError: a matrix does not have its site's shape.
    """
    pairs = [
        list(site_weights or [None] * site.slices) for site, site_weights in zip(sites, weights, strict=True)
    ]
    ranks = [[0 if pair is None else pair[0].shape[0] for pair in site_pairs] for site_pairs in pairs]
    table, elements = plan(sites, ranks)
    region = torch.zeros(elements, dtype=dtype, pin_memory=pin)
    row = 0
    for site, site_pairs in zip(sites, pairs, strict=True):
        for outputs, pair in zip(site.outputs, site_pairs, strict=True):
            a_start, b_start, rank = table[row].tolist()
            row += 1
            if not rank:
                continue
            assert pair is not None
            a, b = pair
            if tuple(a.shape) != (rank, site.inputs) or tuple(b.shape) != (outputs, rank):
                raise ValueError(
                    f"{site.name}: LoRA A {tuple(a.shape)} and B {tuple(b.shape)} do not fit; "
                    f"needed ({rank}, {site.inputs}) and ({outputs}, {rank})"
                )
            region[a_start : a_start + rank * site.inputs].view(rank, site.inputs).copy_(a)
            region[b_start : b_start + rank * outputs].view(rank, outputs).copy_(b.T)
    return Packed(table, region)
