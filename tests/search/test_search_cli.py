"""`lvnas search` and `lvnas derive` as they are typed, on the embedded architecture."""

import json

import pytest

SMALL = ("--steps", 2, "--batch-size", 4, "--targets", "qk", "--ranks", "0,2,4")


def test_search_and_derive(lvnas, raw_tiny, tmp_path):
    out = tmp_path / "search"
    command = ("search", "codewords", "--base", raw_tiny, "--method", "darts", *SMALL, "--out", out)
    code, printed, errors = lvnas(*command, "--json")
    assert code == 0, errors
    free = json.loads(printed)
    assert "searching ranks" in errors and sum(free["histogram"].values()) > free["modules"] - 1

    code, printed, errors = lvnas(*command, "--like-uniform", 2, "--json")
    assert code == 0 and "searching ranks" not in errors  # only allocated again
    summary = json.loads(printed)
    plan = json.loads((out / "ranks.json").read_text())
    assert plan["format"] == "lvnas-ranks/1" and plan["task"] == "codewords" and plan["space"] == [0, 2, 4]
    assert plan["provenance"]["budget"]["like_uniform"] == 2

    for name, extra in (("fresh", ()), ("inherited", ("--inherit",)), ("rs", ("--scaling", "rslora"))):
        code, printed, errors = lvnas(
            "derive", out / "ranks.json", "--out", tmp_path / name, *extra, "--json"
        )
        assert code == 0, errors
        assert json.loads(printed)["parameters"] == summary["parameters"]
        facts = json.loads((tmp_path / name / "lvnas.json").read_text())
        assert (facts["vision_features"], facts["pre_image_rows"]) == ("reference", "transformers")
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert config["use_rslora"] == (name == "rs")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("codewords", "--method", "dart"), "unknown method 'dart'; allowed: darts, score"),
        (("codeword", "--ratio", "2"), "unknown task 'codeword'"),
        (("codewords", "--ranks", "4,x"), "'4,x' are not whole numbers"),
        (("codewords", "--ranks", "4"), "two or more different"),
        (("codewords", "--scaling", "rs"), "unknown scaling 'rs'; allowed: constant, alpha, rslora"),
        (("codewords", "--option", "batches"), "not of the form NAME=VALUE"),
        (("codewords", "--option", "rate=1"), "method 'score' has no option 'rate'; allowed: none"),
        (("codewords", "--targets", "qkv"), "targets 'qkv' match no linear module"),
        (("codewords", "--method", "uniform"), "this method needs a budget; give one of params, ratio"),
        (("codewords", "--method", "uniform", "--params", "1k"), "cannot be reached"),
        (("codewords", "--method", "uniform", "--params", "many"), "not a number of parameters"),
        (("codewords", "--budget-by", "latency", "--ratio", "2"), "latency must be measured"),
        (("codewords", "--ratio", "2", "--max-rank", "1"), "highest rank 1 leaves no rank"),
        (
            ("codewords", "inverted", "--joint", "--ratio", "2", "--weight", "largest=2"),
            "task in weights 'largest'",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(lvnas, raw_tiny, tmp_path, arguments, message):
    code, _, errors = lvnas("search", *arguments, "--base", raw_tiny, "--out", tmp_path / "out")
    assert code == 2
    assert message in errors.splitlines()[-1]
    assert not (tmp_path / "out").exists(), "refused before anything was searched"


def test_repeated_searches(lvnas, raw_tiny, tmp_path):
    out = tmp_path / "search"
    command = ("search", "codewords", "--base", raw_tiny, "--method", "svd", *SMALL, "--out", out)
    code, _, errors = lvnas(*command, "--repeats", 2, "--seed", 5, "--ratio", 2, "--json")
    assert code == 0, errors
    seeds = [json.loads((out / f"seed-{seed}/scores.json").read_text()) for seed in (5, 6)]
    mean = json.loads((out / "mean.json").read_text())
    for row, *singles in zip(mean["values"], *(one["values"] for one in seeds), strict=True):
        assert row == pytest.approx([sum(pair) / 2 for pair in zip(*singles, strict=True)])
    assert mean["errors"][0][1] > 0 and seeds[0]["errors"][0][1] is None
    code, _, errors = lvnas("derive", out / "ranks.json", "--out", tmp_path / "adapter", "--inherit")
    assert code == 0, errors


def test_derive_refuses_what_is_no_plan(lvnas, tmp_path):
    (tmp_path / "ranks.json").write_text('{"model.language_model.layers.0.self_attn.q_proj": 4}')
    code, _, errors = lvnas("derive", tmp_path / "ranks.json", "--out", tmp_path / "adapter")
    assert code == 2 and "names no base; give one with --base" in errors
    code, _, errors = lvnas("derive", tmp_path / "nothing.json", "--out", tmp_path / "adapter")
    assert code == 2 and "no such file" in errors
