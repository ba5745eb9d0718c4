"""The arena and the ledger: any order of loads, unloads and compactions keeps every resident's weights."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lvnas_vllm.ragged.arena import ALIGN, Arena, ArenaFull, Ledger, aligned
from lvnas_vllm.ragged.layout import Site, pack, plan, ranks_of

SIZES = st.integers(0, 400)


class ArenaMachine(RuleBasedStateMachine):
    """Loads and unloads in any order; each resident's region is filled with its own number."""

    def __init__(self):
        super().__init__()
        self.arena = Arena.allocate(1000, torch.float32, "cpu", commit=True)
        self.model: dict[int, int] = {}
        self.next = 1

    @rule(size=SIZES)
    def load(self, size):
        adapter, self.next = self.next, self.next + 1
        if aligned(size) > self.arena.capacity - sum(map(aligned, self.model.values())):
            with pytest.raises(ArenaFull):
                self.arena.take(adapter, size)
            return
        before = {other: self.arena.regions[other][0] for other in self.model}
        start, moved = self.arena.take(adapter, size)
        assert start % ALIGN == 0
        assert {o: s for o, (s, _) in self.arena.regions.items() if o in before and s != before[o]} == moved
        self.model[adapter] = size
        self.arena.region(adapter).fill_(adapter)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def unload(self, data):
        adapter = data.draw(st.sampled_from(sorted(self.model)))
        del self.model[adapter]
        self.arena.give(adapter)
        self.arena.give(adapter)

    @rule()
    def compact(self):
        self.arena.compact()
        assert (
            max((start + size for start, size in self.arena.regions.values()), default=0) == self.arena.used
        )

    @invariant()
    def residents_keep_their_weights(self):
        assert self.arena.regions.keys() == self.model.keys()
        for adapter in self.model:
            assert (self.arena.region(adapter) == adapter).all()

    @invariant()
    def accounting_is_exact(self):
        assert self.arena.used == sum(map(aligned, self.model.values()))
        regions = sorted(self.arena.regions.values())
        assert all(a + n <= b for (a, n), (b, _) in itertools.pairwise(regions) if n)


ArenaMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestArena = ArenaMachine.TestCase


@given(st.lists(SIZES, max_size=12), st.integers(1, 4), st.integers(0, 2000))
@settings(deadline=None)
def test_any_slots_of_the_admitted_adapters_fit_together(sizes, slots, capacity):
    capacity = aligned(capacity)
    ledger = Ledger(capacity, slots)
    for adapter, size in enumerate(sizes):
        try:
            ledger.admit(adapter, size, 2)
        except ValueError as error:
            top = sorted([*ledger.sizes.values(), aligned(size)])[-slots:]
            assert (
                sum(top) > capacity
                and str(aligned(size) * 2) in str(error)
                and str(capacity * 2) in str(error)
            )
    arena = Arena.allocate(capacity, torch.uint8, "cpu", commit=False)
    for adapter in sorted(ledger.sizes, key=ledger.sizes.get)[-slots:]:
        arena.take(adapter, ledger.sizes[adapter])


def test_admitting_again_replaces_and_forgetting_frees():
    ledger = Ledger(capacity=128, slots=2)
    ledger.admit(1, 96, 2)
    with pytest.raises(
        ValueError, match="needs 128 bytes at its own ranks, 64 are free of a capacity of 256"
    ):
        ledger.admit(2, 64, 2)
    ledger.admit(1, 64, 2)
    ledger.admit(2, 64, 2)
    ledger.forget(1)
    ledger.forget(1)
    ledger.admit(3, 64, 2)
    assert ledger.sizes == {2: 64, 3: 64}


def test_layout_is_the_adapters_own_bytes():
    sites = [Site("qkv", 64, (64, 32, 32)), Site("o", 64, (64,)), Site("down", 128, (64,))]
    ranks = [(4, 0, 3), (0,), (5,)]
    table, elements = plan(sites, ranks)
    assert elements == 4 * 128 + 3 * 96 + 5 * 192
    assert table[:, 2].tolist() == [4, 0, 3, 0, 5]
    assert table[2, 0] - table[0, 0] == 4 * 64, "the slices' A rows are adjacent: one fused shrink"


def test_pack_puts_rows_where_the_table_says():
    sites = [Site("qkv", 40, (30, 20))]
    a, b = torch.randn(3, 40), torch.randn(20, 3)
    table, elements = plan(sites, ranks_of(sites, [[None, (a, b)]]))
    region = torch.zeros(elements)
    pack(sites, [[None, (a, b)]], table, region)
    (_, _, none), (a_at, b_at, rank) = table.tolist()
    assert (none, rank) == (0, 3)
    assert torch.equal(region[a_at : a_at + 120].view(3, 40), a)
    assert torch.equal(region[b_at : b_at + 60].view(3, 20), b.T)


def test_pack_refuses_a_matrix_of_another_shape():
    with pytest.raises(ValueError, match=r"o: LoRA A \(3, 41\) and B \(20, 3\) do not fit"):
        sites, table = [Site("o", 40, (20,))], torch.tensor([[0, 128, 3]])
        pack(sites, [[(torch.zeros(3, 41), torch.zeros(20, 3))]], table, torch.zeros(300))
