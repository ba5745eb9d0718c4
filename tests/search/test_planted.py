"""The control with a known answer: `score` finds planted updates; a search that finds nothing would fail here."""

import sys
from pathlib import Path

import pytest
import search_models as models
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks/rank_search"))
from planted import planted


def conditioned_mllama():
    """The random Mllama with weights of full size, so that every module matters to the layers after it."""
    model = models.mllama()
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data.normal_(std=module.in_features**-0.5, generator=generator)
        if isinstance(module, torch.nn.Embedding):
            module.weight.data.normal_(generator=generator)
    return model


def search_planted(seed, method="score"):
    def batch(index):
        return models.mllama_batch(index, 8)

    return planted(conditioned_mllama, batch, seed=seed, method=method, strength=0.3, rate=1e-2)


@pytest.fixture(scope="module", params=[1, 2])
def result(request):
    return search_planted(request.param)


def test_planted_modules_have_the_higher_gains(result):
    assert result["auc"] >= 0.75
    assert result["spearman"] >= 0.4


def test_the_found_plan_fits_like_the_planted_one(result):
    assert result["found"] < result["mean_random"] and result["found"] < result["uniform"]
    assert result["found"] < 1.15 * result["planted"]
    assert result["share_of_random_better"] <= 0.05


def test_inverted_gains_are_worse_than_every_random_plan(result):
    assert result["inverted"] > result["worst_random"]


if __name__ == "__main__":  # the table of docs/search-evidence.md
    import json

    from lvnas.files import provenance

    torch.set_num_threads(1)
    rows = [
        {"seed": seed, "method": method} | search_planted(seed, method)
        for seed in (1, 2, 3, 4)
        for method in ("score", "svd")
    ]
    print(json.dumps({"rows": rows, "provenance": provenance(threads=1)}, indent=1))
