import json

import numpy as np
import pytest
from PIL import Image

from lvnas.errors import InputError
from lvnas.report import _stacks, rank_map, read_results, report


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


ROW = {
    "task": "sum",
    "adapter": "a",
    "method": None,
    "loss": 1.0,
    "perplexity": 2.7,
    "perplexity_with_end": 2.5,
    "metric": "exact",
    "score": 0.5,
    "examples": 4,
    "parameters": 10,
    "share": 0.1,
    "epoch_seconds": 3,
}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (None, "has no list of rows"),
        ([ROW, {"task": "sum"}], "row 2 is {'task': 'sum'}; expected task, adapter"),
        ([ROW | {"more": 1}], "row 1 is"),
        ([5], "row 1 is 5"),
        ([ROW | {"perplexity": "low"}], "row 1: perplexity is 'low'"),
        ([ROW | {"share": None}], "row 1: share is None"),
        ([ROW | {"loss": 10**400}], "row 1: loss is 10"),
    ],
)
def test_rows_that_are_no_results(tmp_path, rows, said):
    (tmp_path / "results.json").write_text(json.dumps({"format": "lvnas-results/1", "rows": rows}))
    with pytest.raises(InputError, match=rf"results\.json.*{said}.*lvnas evaluate"):
        report([tmp_path], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_file_takes_another_s_name(tmp_path):
    ranks = json.dumps({"model.layers.0.mlp.up_proj": 4})
    results = json.dumps({"format": "lvnas-results/1", "rows": [ROW]})
    for name in ("one/adapter.json", "two/adapter.json", "two/x/ranks.json", "three/adapter.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(ranks)
    for name in ("one", "two"):
        (tmp_path / name / "results.json").write_text(results)
    paths = [tmp_path / "one/adapter.json", tmp_path / "two/adapter.json", tmp_path / "two/x/ranks.json"]
    paths += [tmp_path / "one", tmp_path / "two/results.json"]
    again = tmp_path / "two/../one/adapter.json"
    written = report([*paths, again, tmp_path / "one/results.json"], tmp_path / "out")
    names = ["one-adapter-ranks.png", "two-adapter-ranks.png", "x-ranks.png", "one-table.md", "two-table.md"]
    assert [path.name for path in written] == names
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(names)
    alone = report([tmp_path / "three/adapter.json", again.parent], tmp_path / "alone")
    assert [path.name for path in alone] == ["adapter-ranks.png", "table.md"]
