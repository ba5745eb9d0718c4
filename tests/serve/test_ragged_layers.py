"""An adapter cut for tensor parallelism, as the ragged layers store it: the shards make up the whole update."""

from types import SimpleNamespace

import pytest
import torch
from vllm.lora import layers

from lvnas_vllm.ragged.layers import RaggedLinear, ragged

D, HEADS, TP = 24, (16, 8, 8), 2


def shard(kind: str, rank: int, tp: int = TP):
    """A ragged layer of tensor-parallel rank `rank`, with the attributes that vLLM gives it, and no engine."""
    layer = object.__new__(ragged(getattr(layers, kind)))
    layer.__dict__.update(_modules={}, _parameters={}, _buffers={}, tp_size=tp, tp_rank=rank)
    slices = {"MergedQKVParallelLinearWithLoRA": HEADS, "MergedColumnParallelLinearWithLoRA": HEADS[1:]}
    slices["MergedColumnParallelLinearVariableSliceWithLoRA"] = HEADS
    outputs = slices.get(kind, HEADS[:1])
    local = tuple(out // tp for out in outputs)
    layer.n_slices, layer.output_slices, layer.output_sizes = len(outputs), local, list(outputs)
    layer.output_ids, layer.output_size, layer.is_merged_col_linear = (rank,) * len(outputs), local[0], False
    layer.input_size = D // tp
    layer.__dict__["base_layer"] = SimpleNamespace(output_sizes=list(outputs))
    layer.lora_a_stacked = layer.lora_b_stacked = (torch.empty(0),) * len(outputs)
    return layer


def adapter(outputs, ranks):
    draw = torch.Generator().manual_seed(1)
    a = [torch.randn(r, D, generator=draw) if r else None for r in ranks]
    b = [torch.randn(o, r, generator=draw) if r else None for o, r in zip(outputs, ranks, strict=True)]
    return a, b


def update(pair):
    return pair[1] @ pair[0]


@pytest.mark.parametrize(
    ("kind", "outputs", "ranks"),
    [
        ("MergedQKVParallelLinearWithLoRA", HEADS, (4, 0, 3)),
        ("MergedColumnParallelLinearWithLoRA", HEADS[1:], (1, 8)),
    ],
)
def test_merged_layers_cut_each_slice_at_its_own_rank(kind, outputs, ranks):
    a, b = adapter(outputs, ranks)
    shards = [shard(kind, rank).pairs(a, b) for rank in range(TP)]
    for i, rank in enumerate(ranks):
        if not rank:
            assert all(pairs[i] is None for pairs in shards)
            continue
        assert all(pairs[i][0].shape[0] == rank for pairs in shards)
        torch.testing.assert_close(torch.cat([update(pairs[i]) for pairs in shards]), b[i] @ a[i])


def test_column_layers_cut_outputs_and_row_layers_inputs():
    (a,), (b,) = adapter((16,), (5,))
    columns = [shard("ColumnParallelLinearWithLoRA", rank).pairs(a, b)[0] for rank in range(TP)]
    torch.testing.assert_close(torch.cat([update(pair) for pair in columns]), b @ a)
    rows = [shard("RowParallelLinearWithLoRA", rank).pairs(a, b)[0] for rank in range(TP)]
    torch.testing.assert_close(torch.cat([update(pair) for pair in rows], 1), b @ a)


def test_one_checkpoint_weight_for_several_slices_shares_a():
    a, b = torch.randn(3, D), torch.randn(sum(HEADS), 3)
    pairs = shard("MergedColumnParallelLinearVariableSliceWithLoRA", 0, tp=1).pairs(a, b)
    assert [pair[1].shape[0] for pair in pairs] == list(HEADS) and all(pair[0] is a for pair in pairs)
    torch.testing.assert_close(torch.cat([update(pair) for pair in pairs]), b @ a)


def test_a_group_that_covers_several_slices_is_spread_over_them():
    a, b = [torch.randn(2, D), None], [torch.randn(HEADS[0] + HEADS[1], 2), None]
    layer = shard("MergedColumnParallelLinearVariableSliceWithLoRA", 0, tp=1)
    first, second, third = layer.pairs(a, b)
    assert first[1].shape == (HEADS[0], 2) and second[1].shape == (HEADS[1], 2) and third is None


def test_which_layers_are_covered():
    for kind in ("ReplicatedLinearWithLoRA", "QKVParallelLinearWithLoRA", "RowParallelLinearWithLoRA"):
        assert issubclass(ragged(getattr(layers, kind)), RaggedLinear)
    for kind in ("FusedMoEWithLoRA", "RowParallelLinearWithShardedLoRA", "ClassificationHeadWithLoRA"):
        assert ragged(getattr(layers, kind)) is getattr(layers, kind)
