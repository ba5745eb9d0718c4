"""Which image tokens each text row of a Llama-3.2-Vision prompt sees.

Shapes: n images, P tokens per tile, M tiles per image (padding tiles included).
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass


def image_spans(image_at: Sequence[int], length: int) -> list[tuple[int, int]]:
    """The half-open range of rows that sees each image.

    An image is seen from its own token to the next image's; images in direct succession share their end.
    Same as `get_cross_attention_token_mask` of transformers' processor.

    Args:
        image_at: positions of the image tokens, ascending.
        length: number of tokens of the prompt.
    """
    spans: list[tuple[int, int]] = []
    end = length
    for start, following in zip(reversed(image_at), [None, *reversed(image_at)], strict=False):
        if following is not None and following != start + 1:
            end = following
        spans.append((start, end))
    return spans[::-1]


@dataclass(frozen=True)
class Segment:
    """Rows `start:stop` see the image numbers `images`; none where they precede every image."""

    start: int
    stop: int
    images: tuple[int, ...]


def segments(image_at: Sequence[int], length: int) -> list[Segment]:
    """Splits the rows 0..length into runs that see the same images; decoding goes on as the last run."""
    spans = image_spans(image_at, length)
    edges = sorted({0, length, *(edge for span in spans for edge in span)})
    return [
        Segment(start, stop, tuple(i for i, (first, last) in enumerate(spans) if first <= start < last))
        for start, stop in itertools.pairwise(edges)
    ]


def kept_tokens(image_at: Sequence[int], length: int, tiles: Sequence[int], tile_tokens: int) -> int:
    """Tokens that decoding attends to, and so what the cache keeps: the last run's real tiles."""
    return sum(tiles[i] for i in segments(image_at, length)[-1].images) * tile_tokens
