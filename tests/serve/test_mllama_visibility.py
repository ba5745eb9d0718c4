"""Which rows see which images: the same as transformers' processor says, for any order of tokens."""

import random

import pytest
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)

from lvnas_vllm.mllama_visibility import Segment, image_spans, kept_tokens, segments

IMAGE = 9


@pytest.mark.parametrize("seed", range(300))
def test_rows_see_what_the_processors_mask_says(seed: int) -> None:
    rng = random.Random(seed)
    tokens = [rng.choice([1, 1, IMAGE]) for _ in range(rng.randint(1, 14))]
    image_at = [i for i, token in enumerate(tokens) if token == IMAGE]
    if not image_at:
        assert segments(image_at, len(tokens)) == [Segment(0, len(tokens), ())]
        return
    tiles = [rng.randint(1, 4) for _ in image_at]
    mask = convert_sparse_cross_attention_mask_to_dense(
        [get_cross_attention_token_mask(tokens, IMAGE)], [tiles], 4, len(tokens)
    )[0]
    runs = segments(image_at, len(tokens))
    assert [run.start for run in runs[1:]] == [run.stop for run in runs[:-1]]
    for run in runs:
        for row in range(run.start, run.stop):
            assert run.images == tuple(i for i in range(len(tiles)) if mask[row, i].any()), (tokens, row)
    assert kept_tokens(image_at, len(tokens), tiles, 5) == mask[-1].sum() * 5


def test_text_before_a_second_image_sees_only_the_first() -> None:
    assert image_spans([1, 4, 5], 8) == [(1, 4), (4, 8), (5, 8)]
    assert segments([1, 4, 5], 8) == [
        Segment(0, 1, ()),
        Segment(1, 4, (0,)),
        Segment(4, 5, (1,)),
        Segment(5, 8, (1, 2)),
    ]
