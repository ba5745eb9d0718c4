"""Searches of one task that differ in the seed alone: mean gains, and standard errors for every method.

The error of a single search (of `score`) knows the noise of its first gradients; the spread over
seeds also holds that of LoRA's start and of the order of training.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from lvnas.errors import check_counts
from lvnas.strategies import Gains, SearchConfig


def mean_gains(found: Sequence[Gains]) -> Gains:
    """The mean over searches of the same modules and space, with standard errors from their spread.

    A single one comes back as it is, with the errors of its method.
    """
    if len(found) == 1:
        return found[0]
    values = np.stack([gains.values for gains in found])
    errors = values.std(axis=0, ddof=1) / np.sqrt(len(found))
    return dataclasses.replace(found[0], values=values.mean(axis=0), errors=errors)


def seeds_of(config: SearchConfig, repeats: int) -> list[SearchConfig]:
    """`config` with the seeds config.seed, config.seed + 1, ...

    Raises:
        InputError: `repeats` is not a whole number of at least 1.
    """
    check_counts(repeats=repeats)
    return [dataclasses.replace(config, seed=config.seed + number) for number in range(repeats)]


def run_repeats(
    search: Callable[[SearchConfig, Path], Gains], config: SearchConfig, out: Path, repeats: int
) -> Gains:
    """The mean gains of `repeats` searches: of one in `out` itself, else each in `out`/seed-N."""
    configs = seeds_of(config, repeats)
    folders = [out] if repeats == 1 else [out / f"seed-{one.seed}" for one in configs]
    return mean_gains([search(one, folder) for one, folder in zip(configs, folders, strict=True)])
