import itertools

import numpy as np
import pytest

from lvnas.errors import InputError
from lvnas.tasks import EMBEDDED, SPLITS, load_task
from lvnas.tasks.digits import SCANS, scans
from lvnas.tasks.metrics import METRICS

SMALL = {"train": 12, "search": 8, "test": 8}


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_tasks_are_deterministic_and_answerable(name):
    first, second = load_task(name, SMALL), load_task(name, SMALL)
    assert {split: len(first.splits[split]) for split in SPLITS} == SMALL
    for split in SPLITS:
        for one, other in zip(first.splits[split], second.splits[split], strict=True):
            assert (one.user, one.assistant) == (other.user, other.assistant)
            assert one.images[0].tobytes() == other.images[0].tobytes()
            assert METRICS[first.metric](one.assistant, one.assistant) == 1
    answers = {example.assistant for split in SPLITS for example in first.splits[split]}
    assert len(answers) > 1


def test_there_are_at_least_six():
    assert len(EMBEDDED) >= 6


def test_no_scan_is_in_two_splits():
    bounds = sorted(SCANS.values())
    assert bounds[0][0] == 0
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(bounds))
    images, digits = scans()
    assert bounds[-1][1] <= len(images)
    pixels = {split: {images[i].tobytes() for i in range(*SCANS[split])} for split in SPLITS}
    assert not pixels["train"] & pixels["test"]
    assert images.shape == (1797, 8, 8)
    assert set(np.unique(digits)) == set(range(10))


def test_the_picture_shows_the_scans():
    """`sum` shows two digits in the upper left corner; its answer is their sum."""
    images, digits = scans()
    by_pixels = {(images[i] * 255).round().astype(np.uint8).tobytes(): digits[i] for i in range(len(images))}
    for example in load_task("sum", SMALL).splits["test"]:
        pixels = np.asarray(example.images[0])[..., 0]
        assert pixels.shape == (32, 32)
        shown = [by_pixels[pixels[:8, column : column + 8].tobytes()] for column in (0, 8)]
        assert example.assistant == str(sum(shown))
        assert not pixels[8:].any()


def test_unknown_task():
    with pytest.raises(InputError, match=r"unknown task 'docvqaa'; allowed: codewords, .*docvqa.*jsonl"):
        load_task("docvqaa")
