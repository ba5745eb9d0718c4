"""The README's path, command by command; the served part is tested in tests/serve, all of it by the full demo."""

import json

import pytest


def test_the_path_up_to_the_server(lvnas, raw_tiny, tmp_path):
    def run(*arguments):
        code, out, err = lvnas(*arguments)
        assert code == 0, err
        return out

    adapters = []
    for kind, options in (
        ("searched", ["--method", "darts", "--ratio", 2.6, "--steps", 2, "--batch-size", 4]),
        ("uniform", ["--method", "uniform", "--like-uniform", 64]),
    ):
        search, derived, adapter = (tmp_path / f"{part}-{kind}" for part in ("search", "derived", "adapter"))
        run("search", "codewords", "--base", raw_tiny, *options, "--out", search)
        run("derive", search / "ranks.json", "--out", derived)
        run("finetune", derived, "codewords", "--steps", 2, "--batch-size", 4, "--out", adapter)
        adapters.append(adapter)
    rows = json.loads(run("evaluate", *adapters, "--examples", 4, "--out", tmp_path / "results", "--json"))
    assert [(row["adapter"], row["method"]) for row in rows] == [
        (None, None),
        ("adapter-searched", "darts"),
        ("adapter-uniform", "uniform"),
    ]
    assert rows[2]["parameters"] / rows[1]["parameters"] == pytest.approx(2.6, rel=0.01)
    run("report", *adapters, tmp_path / "results", "--out", tmp_path / "report")
    assert len(list((tmp_path / "report").glob("*.png"))) == 2
    for layout in ("pad", "ragged"):
        pack = tmp_path / f"pack-{layout}"
        run("pack", *adapters, "--layout", layout, "--out", pack)
        run("verify", pack)
        launch = json.loads(run("serve", pack, "--dry-run", "--json", "--port", "8123"))
        assert list(launch["adapters"]) == ["adapter-searched", "adapter-uniform"]
        assert launch["argv"][-2:] == ["--port", "8123"]
        assert launch["env"].get("LVNAS_RAGGED") == ("1" if layout == "ragged" else None)


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_the_demo(tmp_path, lvnas):
    """The whole path with the trained base, served and load-tested; the second run keeps what is there."""
    arguments = ["demo", "--out", tmp_path / "demo", "--json"]
    code, out, err = lvnas(*arguments)
    assert code == 0, err
    summary = json.loads(out.splitlines()[-1])
    assert summary["peak_memory_bytes"] < 8 * 2**30
    assert len(summary["answers"]) == 6
    rows = json.loads((tmp_path / "demo/results/results.json").read_text())["rows"]
    alone = {row["task"]: row["score"] for row in rows if row["adapter"] is None}
    assert all(row["score"] > alone[row["task"]] + 0.3 for row in rows if row["adapter"])
    result = json.loads((tmp_path / "demo/loadtest/result.json").read_text())
    assert result["failed"] == 0 and result["completed"] > 10
    code, out, err = lvnas(*arguments)
    assert code == 0, err
    assert out.count("# kept:") > 12
