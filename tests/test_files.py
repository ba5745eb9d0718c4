import json
import re
import subprocess
from pathlib import Path

import pytest

from lvnas import files
from lvnas.errors import InputError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "out"
    with pytest.raises(RuntimeError), files.atomic_folder(target) as draft:
        (draft / "half").write_text("x")
        raise RuntimeError
    assert names(tmp_path) == []
    with files.atomic_folder(target) as draft:
        (draft / "a").write_text("1")
        assert not target.exists()
    with pytest.raises(KeyboardInterrupt), files.atomic_folder(target) as draft:
        (draft / "b").write_text("2")
        raise KeyboardInterrupt
    assert names(tmp_path) == ["out"]
    assert names(target) == ["a"]


def test_a_new_folder_replaces_the_old_one(tmp_path):
    for content in "12":
        with files.atomic_folder(tmp_path / "out") as draft:
            (draft / content).write_text(content)
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["2"]


def test_only_a_folder_of_ours_may_be_replaced(tmp_path):
    target = tmp_path / "out"
    files.refuse_foreign(target, "run.json")
    target.mkdir()
    files.refuse_foreign(target, "run.json")
    (target / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match=r"out holds something else .* choose another --out or remove it"):
        files.refuse_foreign(target, "run.json")
    (target / "run.json").write_text("{}")
    with pytest.raises(InputError, match="something else"):
        files.refuse_foreign(target, "page.html", "run.json")
    files.refuse_foreign(target, "page.html", "run.json", others=True)
    with pytest.raises(InputError, match="something else"):
        files.refuse_foreign(target / "thesis.tex", "run.json")
    (target / "thesis.tex").rename(target / ".run.json.k1ll3d")  # what a kill leaves of an atomic write
    files.refuse_foreign(target, "run.json")


def test_an_old_folder_is_swapped_in_one_step(tmp_path, monkeypatch):
    """A kill between two renames would leave neither under its name."""
    with files.atomic_folder(tmp_path / "out") as draft:
        (draft / "1").touch()
    (tmp_path / "link").symlink_to("out")
    moves = []
    monkeypatch.setattr(files.os, "replace", lambda *names: moves.append(names))
    with files.atomic_folder(tmp_path / "link") as draft:
        (draft / "2").touch()
    assert not moves and names(tmp_path) == ["link", "out"]
    assert (tmp_path / "link").is_symlink() and names(tmp_path / "out") == ["2"]
    monkeypatch.undo()
    monkeypatch.setattr(files, "_exchange", lambda *_: False)  # a file system that cannot
    with files.atomic_folder(tmp_path / "out") as draft:
        (draft / "3").touch()
    assert names(tmp_path) == ["link", "out"] and names(tmp_path / "out") == ["3"]


def test_a_place_that_cannot_be_written_is_refused_early(tmp_path):
    files.check_out(tmp_path / "new/deep")
    assert names(tmp_path) == []
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file/deep cannot be made: .*file is a file; choose another --out"):
        files.check_out(tmp_path / "file/deep")


def test_a_file_keeps_its_old_content_when_writing_fails(tmp_path):
    path = tmp_path / "deep" / "value.json"
    files.write_json(path, {"a": "ä"})
    assert files.read_json(path) == {"a": "ä"}
    with pytest.raises(TypeError):
        files.write_json(path, {"a": object()})
    with pytest.raises(TypeError):
        files.write_bytes(path, "no bytes")
    assert files.read_json(path) == {"a": "ä"}
    assert names(path.parent) == ["value.json"]


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"", b"[" * 100_000])
def test_what_is_not_json(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(InputError, match=r"x\.json"):
        files.read_json(tmp_path / "x.json")


def test_provenance_names_command_commit_versions_and_machine():
    made = files.provenance(seed=3)
    root = Path(__file__).parents[1]
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True
    ).stdout
    assert head.startswith(made["commit"].removesuffix("-dirty"))
    assert made["seed"] == 3
    assert {"lvnas", "torch", "transformers", "peft", "python"} <= set(made["versions"])
    assert all(made["versions"].values())
    assert re.match(r"\d{4}-\d\d-\d\dT", made["date"])
    json.dumps(made)
