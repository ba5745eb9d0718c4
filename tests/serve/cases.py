"""Requests drawn by a seeded generator: text, images of every shape and place, any adapter."""

import random
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

BOS, IMAGE = "<|begin_of_text|>", "<|image|>"
WORDS = ("a", "two digits", "sum?", " left", "what", " Ünï", "7", " is it\n", "0.5", "yes or no", " the", "!")


@dataclass
class Case:
    """One request: `text` holds an image token for each of `images`; `adapter` None is the base."""

    text: str
    images: list[Image.Image] = field(default_factory=list)
    adapter: str | None = None
    tokens: int = 6


def draw_image(rng: random.Random, tile: int) -> Image.Image:
    """An image of random pixels whose shape lands on any tile count and aspect ratio."""
    width, height = (max(4, int(tile * rng.uniform(0.3, 4.2))) for _ in range(2))
    pixels = np.random.default_rng(rng.getrandbits(32)).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def draw_text(rng: random.Random, least: int = 0, most: int = 8) -> str:
    return "".join(rng.choice(WORDS) for _ in range(rng.randint(least, most)))


def draw_case(rng: random.Random, adapters: list[str | None], tile: int = 28, most_images: int = 3) -> Case:
    """A prompt of text runs and image tokens in any order, images in succession included."""
    images = rng.choice([0, 1, 1, 1, 1, 2, most_images])
    runs = [draw_text(rng, most=rng.choice([0, 4, 12])) for _ in range(images)]
    text = BOS + "".join(run + IMAGE for run in runs) + draw_text(rng, least=1, most=20)
    if images and rng.random() < 0.2:  # as the processor writes it: the image before the begin-of-text token
        text = IMAGE + BOS + text.removeprefix(BOS).replace(IMAGE, "", 1)
    pictures = [draw_image(rng, tile) for _ in range(images)]
    return Case(text, pictures, rng.choice(adapters), rng.randint(1, 8))


def draw_cases(seed: int, count: int, adapters: list[str | None], **options: int) -> list[Case]:
    rng = random.Random(seed)
    return [draw_case(rng, adapters, **options) for _ in range(count)]


def draw_batches(seed: int, cases: list[Case], most: int = 16) -> list[list[Case]]:
    """Cuts `cases` into batches of 1 to `most`."""
    rng, batches, start = random.Random(seed), [], 0
    while start < len(cases):
        size = rng.randint(1, most)
        batches.append(cases[start : start + size])
        start += size
    return batches
