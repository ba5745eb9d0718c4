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


@dataclass
class Packed:
    """One registered adapter."""

    table: torch.Tensor
    """As `plan` gives it."""
    weights: torch.Tensor | None
    """The registered copy, 1-D; None where that is the arena's own region."""
    elements: int
    """Of its region."""


def pack(
    sites: Sequence[Site],
    weights: Sequence[Sequence[Pair | None] | None],
    table: torch.Tensor,
    region: torch.Tensor,
) -> None:
    """Copies an adapter's matrices to where `table` puts them in `region` (1-D).

    `weights` holds per site its slices' pairs, None where a slice or a site has none.

    Raises:
        ValueError: a matrix does not have its site's shape.
    """
    row = 0
    for site, own in zip(sites, weights, strict=True):
        for outputs, pair in zip(site.outputs, own or [None] * site.slices, strict=True):
            a_start, b_start, rank = table[row].tolist()
            row += 1
            if pair is None or not rank:
                continue
            a, b = pair
            if tuple(a.shape) != (rank, site.inputs) or tuple(b.shape) != (outputs, rank):
                raise ValueError(
                    f"{site.name}: LoRA A {tuple(a.shape)} and B {tuple(b.shape)} do not fit; "
                    f"needed ({rank}, {site.inputs}) and ({outputs}, {rank})"
                )
            region[a_start : a_start + rank * site.inputs].view(rank, site.inputs).copy_(a)
            region[b_start : b_start + rank * outputs].view(rank, outputs).copy_(b.T)


def ranks_of(sites: Sequence[Site], weights: Sequence[Sequence[Pair | None] | None]) -> list[list[int]]:
    """The rank of each site's slices, 0 where there is no pair."""
    return [
        [0 if pair is None else pair[0].shape[0] for pair in own or [None] * site.slices]
        for site, own in zip(sites, weights, strict=True)
    ]
