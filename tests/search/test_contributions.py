"""The regression on random plans finds what their losses were made of, and nothing where they were noise."""

import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks/rank_search"))
import contributions

MODULES, SEEDS, PLANS = 20, 4, 40


@pytest.fixture
def truth():
    return np.random.default_rng(0).normal(size=MODULES)


def made_cells(weight, noise):
    """Cells whose random plans' log losses are `weight` [N] times log2(1 + rank), and noise."""
    random = np.random.default_rng(1)
    cells = {}
    for seed in range(SEEDS):
        ranks = random.choice([0, 1, 2, 4, 8], size=(PLANS, MODULES))
        logs = seed - np.log2(1 + ranks) @ weight + noise * random.normal(size=PLANS)
        rows = {
            (f"random-{n}", "restart"): {"ranks": list(r), "test": np.exp(v)}
            for n, (r, v) in enumerate(zip(ranks, logs, strict=True))
        }
        inherited = {("random-0", "inherit"): {"ranks": list(ranks[0]), "test": 1e6}}  # not to be looked at
        cells["codes", seed, 1.0] = rows | inherited
    return cells


def test_contributions_are_what_the_losses_were_made_of(truth):
    seeds = contributions.random_plans(made_cells(truth, noise=0.5), 1.0, "codes")
    assert len(seeds) == SEEDS and seeds[0][0].shape == (PLANS, MODULES)
    assert spearmanr(contributions.fit(seeds), truth)[0] > 0.95
    assert contributions.predicted(seeds) > 0.9


def test_noise_predicts_nothing(truth):
    seeds = contributions.random_plans(made_cells(0 * truth, noise=1.0), 1.0, "codes")
    assert abs(contributions.predicted(seeds)) < 0.3


def test_the_report_tells_a_good_search_from_a_bad_one(truth):
    cells = made_cells(truth, noise=0.5)
    searches = {("good", "codes", 0): list(np.exp(truth)), ("bad", "codes", 0): list(-truth)}
    lines = contributions.report(cells, searches, ["good", "bad"]).splitlines()
    numbers = {line.split("|")[1].strip(): float(line.split("|")[-2]) for line in lines[2:]}
    assert numbers["gains of good"] > 0.95 and numbers["gains of bad"] < -0.95
    assert numbers["losses of unseen random plans"] > 0.9
