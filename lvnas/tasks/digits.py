"""The embedded tasks: questions about images composed of real handwritten digits.

The 1,797 scans of 8x8 pixels are scikit-learn's bundled copy of the UCI "Optical Recognition of Handwritten Digits"
set. A scan belongs to one split only, so no pixel of a test image was seen in training. Everything is drawn from a
seeded generator: the same name, split and count give the same examples.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from lvnas.tasks.task import SPLITS, Example, Task

CELL = 8
GRID = 4
"""A tile of the tiny base is GRID x GRID cells of CELL pixels: one patch is one scan."""

CODE = ("bako", "celu", "dimo", "fera", "goti", "hunu", "jola", "kipe", "meru", "nasi")
"""Names of the digits 0..9 in the `codewords` tasks; no base can know them."""
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ORDINALS = ("first", "second", "third", "fourth")

Cells = np.ndarray  # [rows, columns] of digits 0..9


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a task draws its cells, changes the picture and asks."""

    ask: Callable[[Cells, np.random.Generator], tuple[str, str]]
    """Digits and generator -> question and answer."""
    shape: tuple[int, int] = (2, 2)
    """Rows and columns of digits."""
    show: Callable[[np.ndarray], np.ndarray] = lambda pixels: pixels
    """Changes one scan, [CELL, CELL] in 0..1."""
    metric: str = "exact"


def _at(cells: Cells, random: np.random.Generator) -> tuple[int, str]:
    row, column = random.integers(cells.shape[0]), random.integers(cells.shape[1])
    return int(cells[row, column]), f"row {row + 1} column {column + 1}"


def ask_read(cells: Cells, random: np.random.Generator) -> tuple[str, str]:
    return "Read the digits.", " ".join(str(digit) for digit in cells.flat)


def ask_point(cells: Cells, random: np.random.Generator) -> tuple[str, str]:
    digit, place = _at(cells, random)
    return f"Which digit is in {place}?", str(digit)


def ask_codeword(cells: Cells, random: np.random.Generator) -> tuple[str, str]:
    digit, place = _at(cells, random)
    return f"What is the code word in {place}?", CODE[digit]


def ask_sum(cells: Cells, random: np.random.Generator) -> tuple[str, str]:
    return "What is the sum of the digits?", str(int(cells.sum()))


def ask_largest(cells: Cells, random: np.random.Generator) -> tuple[str, str]:
    return "What is the largest digit?", str(int(cells.max()))


def ask_compare(cells: Cells, random: np.random.Generator) -> tuple[str, str]:
    left, right = cells.flat
    return "Is the left digit larger than the right one?", "yes" if left > right else "no"


def ask_locate(cells: Cells, random: np.random.Generator) -> tuple[str, str]:
    row, column = random.integers(cells.shape[0]), random.integers(cells.shape[1])
    digit = cells[row, column]
    first = next(i for i, value in enumerate(cells.flat) if value == digit)
    row, column = divmod(first, cells.shape[1])
    return f"Where is the first {WORDS[digit]}?", f"{ORDINALS[row]} row, {ORDINALS[column]} column"


def ask_reverse(cells: Cells, random: np.random.Generator) -> tuple[str, str]:
    return "Read the digits backwards.", " ".join(str(digit) for digit in cells.flat[::-1])


def invert(pixels: np.ndarray) -> np.ndarray:
    return 1 - pixels


def rotate(pixels: np.ndarray) -> np.ndarray:
    return np.rot90(pixels)


RECIPES: dict[str, Recipe] = {
    "codewords": Recipe(ask_codeword),
    "inverted": Recipe(ask_read, show=invert),
    "rotated": Recipe(ask_read, show=rotate),
    "inverted-codewords": Recipe(ask_codeword, show=invert),
    "sum": Recipe(ask_sum, shape=(1, 2)),
    "largest": Recipe(ask_largest, shape=(1, 3)),
    "compare": Recipe(ask_compare, shape=(1, 2), metric="yes_no"),
    "locate": Recipe(ask_locate),
    "reverse": Recipe(ask_reverse, shape=(1, 6)),
}

SIZES = {"train": 4096, "search": 512, "test": 512}
SCANS = {"train": (0, 1200), "search": (1200, 1500), "test": (1500, 1797)}


@functools.cache
def scans() -> tuple[np.ndarray, np.ndarray]:
    """The scans, [1797, 8, 8] in 0..1, and their digits, [1797], in a fixed random order."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    return (data.images[order] / 16.0).astype(np.float32), data.target[order]


def compose(recipe: Recipe, split: str, random: np.random.Generator, source: str) -> Example:
    """Draws one example of `recipe` from the scans of `split`.

    The picture is RGB, as wide and high as its digits need in whole tiles of GRID cells; the digits stand in its
    upper left corner, row by row.
    """
    images, digits = scans()
    rows, columns = recipe.shape
    chosen = random.integers(*SCANS[split], size=(rows, columns))
    tile = CELL * GRID
    height, width = (-(-count // GRID) * tile for count in (rows, columns))
    canvas = np.zeros((height, width), dtype=np.float32)
    for row, column in np.ndindex(rows, columns):
        cell = recipe.show(images[chosen[row, column]])
        canvas[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL] = cell
    picture = Image.fromarray((canvas * 255).round().astype(np.uint8)).convert("RGB")
    question, answer = recipe.ask(digits[chosen], random)
    return Example((picture,), question, answer, source)


def embedded_task(name: str, sizes: dict[str, int] | None = None) -> Task:
    """The embedded task `name` with `sizes` examples per split (SIZES by default)."""
    recipe = RECIPES[name]
    sizes = SIZES | (sizes or {})
    splits = {}
    for number, split in enumerate(SPLITS):
        random = np.random.default_rng([sum(name.encode()), len(name), number])
        splits[split] = [compose(recipe, split, random, name) for _ in range(sizes[split])]
    return Task(name, splits, recipe.metric)
