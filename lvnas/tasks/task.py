"""What a task is."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from PIL import Image

SPLITS = ("train", "search", "test")
"""train: weights; search: the held-out data of the rank search and of tuning; test: reported numbers only."""


@dataclass(frozen=True, slots=True)
class Example:
    """One question about some images: one entry of a row's `texts` in The Cauldron's schema."""

    images: tuple[Image.Image, ...]
    user: str
    assistant: str
    source: str


@dataclass(frozen=True, slots=True)
class Task:
    """A named set of examples in three splits that share no image."""

    name: str
    splits: dict[str, list[Example]]
    metric: str
    """Name of the task's metric in `lvnas.tasks.metrics`."""

    def sha256(self, *splits: str) -> str:
        """The hex SHA-256 of the examples of `splits`: texts and pixels."""
        pixels: dict[int, bytes] = {}  # one image has several questions
        digest = hashlib.sha256()
        for split in splits:
            for example in self.splits[split]:
                for image in example.images:
                    if id(image) not in pixels:
                        pixels[id(image)] = hashlib.sha256(
                            f"{image.size}".encode() + image.tobytes()
                        ).digest()
                texts = repr((split, example.user, example.assistant))
                digest.update(texts.encode() + b"".join(pixels[id(image)] for image in example.images))
        return digest.hexdigest()


def split_by_image(
    rows: Iterable[dict], shares: tuple[float, float] = (0.1, 0.1)
) -> dict[str, list[Example]]:
    """Splits rows of The Cauldron's schema by image, so that no image is in two splits.

    A row's split follows from a hash of its images' pixels alone, so that it depends on neither the order nor the
    number of rows.

    Args:
        rows: `{"images": [PIL images], "texts": [{"user", "assistant", "source"}]}`.
        shares: of the search and of the test split; the rest is train.
    """
    splits: dict[str, list[Example]] = {name: [] for name in SPLITS}
    search, test = shares
    for row in rows:
        images = tuple(image.convert("RGB") for image in row["images"])
        digest = hashlib.sha256(b"".join(str(i.size).encode() + i.tobytes() for i in images)).digest()
        place = int.from_bytes(digest[:8], "big") / 2**64
        name = "search" if place < search else "test" if place < search + test else "train"
        for text in row["texts"]:
            splits[name].append(Example(images, text["user"], text["assistant"], text.get("source", "")))
    return splits


def limited(splits: dict[str, list[Example]], sizes: dict[str, int] | None) -> dict[str, list[Example]]:
    """The first `sizes[split]` examples of every split; all of a split that `sizes` does not name."""
    return {name: examples[: (sizes or {}).get(name)] for name, examples in splits.items()}
