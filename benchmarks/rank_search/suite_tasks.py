"""The suite's tasks: reading a 2 x 2 grid of digits, changed in what is shown, in how it is named, or in the order.

The base reads such grids row by row (`small_base.py`); each task needs another part of it to change. Scans are split
as in `lvnas.tasks.digits`: no scan of a test image was seen in training.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from lvnas.tasks import digits
from lvnas.tasks.batches import IGNORED

SIDE = 2 * digits.CELL
"""Pixels of an image, without the empty part of a tile."""
PROMPT = "<|image|><|begin_of_text|>Read."
"""No chat turns and no end of turn: the suite pays for every token."""
CODES = np.stack([np.random.default_rng(seed).permutation(10) for seed in (3, 4, 5, 6, 7)])
"""Other digits as names of the digits: one code for all cells, then one for each of the four cells."""


def reading(change: Callable[[np.ndarray], np.ndarray], **how: Any) -> digits.Recipe:
    """The answer is `change` of the four digits in reading order."""

    def ask(cells: digits.Cells, random: np.random.Generator) -> tuple[str, str]:
        return "Read.", "".join(str(digit) for digit in change(cells.ravel()))

    return digits.Recipe(ask, **how)


def plain(four: np.ndarray) -> np.ndarray:
    return four


def code(four: np.ndarray) -> np.ndarray:
    return CODES[0][four]


def codes(four: np.ndarray) -> np.ndarray:
    return CODES[1:][np.arange(4), four]


def mirror(pixels: np.ndarray) -> np.ndarray:
    return pixels[:, ::-1]


PLAIN = reading(plain)
"""What the base can do."""
RECIPES = {
    "codes": reading(codes),
    "rotated": reading(plain, show=digits.rotate),
    "sorted": reading(np.sort),
    "rotated-code": reading(code, show=digits.rotate),
    "mirrored-code": reading(code, show=mirror),
}


def draw(recipe: digits.Recipe, split: str, count: int, seed: int, processor: Any) -> dict[str, Tensor]:
    """`count` examples from the scans of `split` as one batch, labels on the answers' tokens."""
    random = np.random.default_rng(seed)
    examples = [digits.compose(recipe, split, random, "rank search") for _ in range(count)]
    batch = processor(
        images=[[example.images[0].crop((0, 0, SIDE, SIDE))] for example in examples],
        text=[PROMPT + example.assistant for example in examples],
        add_special_tokens=False,
        return_tensors="pt",
    )
    labels = batch["input_ids"].clone()
    labels[:, : -len(examples[0].assistant)] = IGNORED
    return {**batch, "labels": labels}


def permute_answers(batch: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """The batch with each image under another one's answer."""
    order = np.random.default_rng(seed).permutation(len(batch["labels"]))
    return batch | {name: batch[name][order] for name in ("input_ids", "labels")}
