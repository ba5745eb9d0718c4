"""Which tokens of a step belong to which adapter slot: worked out once per step, shared by all layers."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LONG = 32
"""Tokens from which a run of one adapter is a matrix product of its own, not part of the grouped call."""
LONG_NATIVE = 512
"""The same where the grouped call is native: below, a matrix product of few columns costs more than it computes."""


@dataclass(frozen=True)
class Runs:
    """The step's tokens by adapter slot; tokens without an adapter are in none of the lists."""

    tokens: int
    """T, counting those without an adapter."""
    long: tuple[tuple[int, int, int], ...]
    """(slot, first token, one past the last token) of each run of `LONG` tokens or more."""
    slots: np.ndarray
    """int32 [G]: the slot of each group of the remaining tokens."""
    starts: np.ndarray
    """int32 [G + 1]: where each group starts in `members`."""
    members: np.ndarray
    """int32: the tokens of the groups, a slot's tokens together."""

    @functools.cached_property
    def arguments(self) -> tuple[int, ...]:
        """The native operator's."""
        return (self.slots.ctypes.data, self.starts.ctypes.data, self.members.ctypes.data, len(self.slots))

    @property
    def empty(self) -> bool:
        return not self.long and not len(self.slots)


NO_RUNS = Runs(0, (), np.empty(0, np.int32), np.zeros(1, np.int32), np.empty(0, np.int32))


def find_runs(token_slots: np.ndarray, long: int = LONG) -> Runs:
    """The runs of `token_slots` (int [T]: the adapter slot of each token, below 0 for none)."""
    tokens = len(token_slots)
    if not tokens or token_slots.max() < 0:
        return Runs(tokens, (), NO_RUNS.slots, NO_RUNS.starts, NO_RUNS.members)
    edges = np.flatnonzero(np.diff(token_slots)) + 1
    firsts, ends = np.concatenate([[0], edges]), np.concatenate([edges, [tokens]])
    slots = token_slots[firsts]
    is_long = (ends - firsts >= long) & (slots >= 0)
    long_runs = tuple(
        (int(slot), int(first), int(end))
        for slot, first, end in zip(slots[is_long], firsts[is_long], ends[is_long], strict=True)
    )
    short = np.repeat(~is_long & (slots >= 0), ends - firsts)
    members = np.flatnonzero(short)
    members = members[np.argsort(token_slots[members], kind="stable")].astype(np.int32)
    groups, counts = np.unique(token_slots[members], return_counts=True)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    return Runs(tokens, long_runs, groups.astype(np.int32), starts, members)


def token_slots(adapters: Sequence[int], slot_adapters: Sequence[int | None]) -> np.ndarray:
    """int32 [T]: the slot of each token, -1 for none, from each token's adapter id (0 or less for none).

    `slot_adapters` holds each slot's adapter id, None where the slot is empty.
    """
    ids = np.asarray(adapters, dtype=np.int64)
    known = np.array([-1 if adapter is None else adapter for adapter in slot_adapters], dtype=np.int64)
    order = np.argsort(known, kind="stable")
    place = np.minimum(np.searchsorted(known[order], ids), len(known) - 1)
    slots = order[place]
    wanted = ids > 0
    if (known[slots[wanted]] != ids[wanted]).any():
        missing = sorted(set(ids[wanted][known[slots[wanted]] != ids[wanted]].tolist()))
        raise KeyError(f"adapters {missing} are not active")
    return np.where(wanted, slots, -1).astype(np.int32)
