import numpy as np
import pytest
from PIL import Image

from lvnas.errors import InputError
from lvnas.report import _stacks, rank_map, read_results


def test_stacks_put_each_rank_in_its_place():
    ranks = {
        "model.language_model.layers.0.self_attn.q_proj": 4,
        "model.language_model.layers.2.mlp.down_proj": 8,
        "model.language_model.layers.1.cross_attn.q_proj": 16,
        "model.vision_model.transformer.layers.0.mlp.fc1": 32,
        "lm_head": 2,
    }
    stacks = _stacks(ranks)
    grid, kinds, crossed = stacks["language_model"]
    assert kinds == ["q_proj", "down_proj"]
    np.testing.assert_array_equal(grid, [[4, 16, np.nan], [np.nan, np.nan, 8]])
    assert crossed == {1}
    assert next(iter(stacks)) == "vision_model.transformer"
    assert stacks["lm_head"][0].tolist() == [[2]]


def test_the_picture_has_a_colour_per_rank(tmp_path):
    ranks = {f"model.layers.{i}.mlp.up_proj": rank for i, rank in enumerate((4, 8, 64, 64))}
    rank_map(ranks, tmp_path / "map.png", title="four layers")
    first = np.asarray(Image.open(tmp_path / "map.png").convert("RGB"))
    rank_map(ranks | {"model.layers.0.mlp.up_proj": 64}, tmp_path / "map.png", title="four layers")
    second = np.asarray(Image.open(tmp_path / "map.png").convert("RGB"))
    assert first.shape[2] == 3 and first.shape[0] > 100
    assert first.shape != second.shape or (first != second).any()


def test_not_a_results_file(tmp_path):
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(InputError, match="lvnas-results/1"):
        read_results(tmp_path / "results.json")
