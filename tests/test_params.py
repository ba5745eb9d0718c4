"""The counts of the paper's Table 1, exactly."""

import json
from pathlib import Path

import pytest

from lvnas.errors import InputError
from lvnas.params import count
from lvnas.ranks import RankPlan

PUBLISHED = Path(__file__).parents[2] / "shared/paper/published_ranks_llama32_11b.json"


@pytest.mark.parametrize(
    ("targets", "modules", "parameters"),
    [("all", 520, 268_697_600), ("gud", 120, 141_557_760), ("qk", 160, 47_185_920)],
)
def test_uniform_rank_64_on_llama_3_2_11b_vision(targets, modules, parameters):
    found = count("llama-3.2-11b-vision", targets=targets, rank=64)
    assert (found.modules, found.parameters) == (modules, parameters)
    assert found.base_parameters == 10_642_941_475


def test_all_costs_4198400_parameters_per_rank():
    assert count("llama-3.2-11b-vision", rank=1).parameters == 4_198_400


@pytest.mark.skipif(not PUBLISHED.exists(), reason="the published ranks are not in the repository")
def test_the_published_configuration():
    found = count("llama-3.2-11b-vision", ranks=PUBLISHED)
    assert (found.modules, found.parameters) == (520, 103_255_040)


def test_bad_input_is_one_line_and_code_2(lvnas, tmp_path):
    for arguments, said in (
        (["--base", "nope", "--rank", 4], "unknown base 'nope'; allowed: tiny, llama-3.2-11b-vision"),
        (["--targets", "foo", "--rank", 4], "'foo'"),
        ([], "--rank"),
        (["--rank", -1], "-1"),
        (["--ranks", tmp_path / "missing.json"], "missing.json"),
    ):
        code, out, err = lvnas("params", *arguments)
        assert (code, out) == (2, "")
        assert said in err
        assert err.count("\n") == 1


def test_json_output(lvnas):
    code, out, _ = lvnas("params", "--base", "tiny", "--rank", 4, "--json")
    assert code == 0
    assert set(json.loads(out)) >= {"parameters", "modules", "share"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[1]", "a list"),
        ("{}", "no module"),
        ('{"a": 1.5}', "1.5"),
        ('{"a": true}', "true"),
        ('{"a": -1}', "-1"),
        ('{"format": "lvnas-ranks/9", "ranks": {"a": 1}}', "lvnas-ranks/9"),
        ('{"vision_model.a": 1, "model.vision_model.a": 2}', "twice"),
        ("{", "not a JSON file"),
        ('{"a": 100000000000000000000000}', r"ranks\.json: rank of a is 10{23}; expected .* at most 16384"),
        *(
            (f'{{"format": "lvnas-ranks/1", "ranks": {{"a": 1}}, {more}}}', said)
            for more, said in (
                ('"base": 5', r"ranks\.json: base is 5; expected text"),
                ('"space": ["a"]', 'rank of the space is "a"; expected a whole number'),
                ('"space": 4', "space is 4; expected a list"),
                ('"provenance": "x"', 'provenance is "x"; expected an object'),
                ('"scaling": "constant"', 'scaling is "constant"; expected an object'),
                (
                    '"scaling": {"convention": ["a"]}',
                    r'convention is \["a"\]; expected one of constant, alpha',
                ),
                ('"scaling": {"scale": "x"}', 'scale is "x"; expected a number > 0'),
                ('"scaling": {"scale": NaN}', "scale is NaN"),
                ('"scaling": {"scale": 1e999}', "scale is Infinity"),
                ('"scaling": {"scale": 0}', "scale is 0"),
                ('"scaling": {"scale": -1.5}', "scale is -1.5"),
                ('"scaling": {"scale": true}', "scale is true"),
            )
        ),
    ],
)
def test_bad_ranks_files(tmp_path, content, said):
    path = tmp_path / "ranks.json"
    path.write_text(content)
    with pytest.raises(InputError, match=said):
        RankPlan.read(path)


def test_a_plan_survives_its_file(tmp_path):
    plan = RankPlan(
        ranks={"model.a": 4, "model.b": 0}, base="tiny", task="sum", method="darts", space=[0, 4], scale=0.5
    )
    plan.write(tmp_path / "ranks.json")
    assert RankPlan.read(tmp_path / "ranks.json") == plan


def test_a_plan_of_another_base_is_refused():
    with pytest.raises(InputError, match=r"model\.b"):
        RankPlan(ranks={"model.a": 1, "model.b": 1}).parameters({"model.a": (2, 3)})
