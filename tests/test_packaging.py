"""The wheel works where there is no checkout, and the README says what is true."""

import os
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from lvnas.cli import VERBS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT],
        check=True,
        capture_output=True,
    )
    (path,) = out.glob("*.whl")
    return path


def test_only_lvnas_packages_are_in_the_wheel(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {
        "lvnas",
        "lvnas_vllm",
        "lvnas_loadtest",
    }
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    for line in tracked.stdout.splitlines():
        if line.startswith(("lvnas/", "serve/", "loadtest/")):
            inside = line.removeprefix("serve/").removeprefix("loadtest/")
            assert inside in names, f"{line} is not in the wheel"


def test_the_wheel_runs_in_a_clean_environment(wheel, tmp_path):
    """A fresh environment that sees the libraries of this one, but not this checkout."""
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    site = next((tmp_path / "env" / "lib").glob("python*/site-packages"))
    zipfile.ZipFile(wheel).extractall(site)
    libraries = [path for path in sys.path if path.endswith("site-packages")]
    # A plain path entry: .pth files in it, such as this checkout's editable install, are not read.
    (site / "libraries.pth").write_text("\n".join(libraries))
    run = {"cwd": tmp_path, "capture_output": True, "text": True, "check": False}
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    done = subprocess.run([python, "-m", "lvnas", "--help"], env=environment, **run)
    assert done.returncode == 0, done.stderr
    assert all(f"  {verb}" in done.stdout for verb in VERBS)
    where = "import lvnas, lvnas_vllm, lvnas_loadtest as l; print(lvnas.__file__, lvnas_vllm.__file__, l.__file__)"
    done = subprocess.run([python, "-c", where], env=environment, **run)
    assert all(path.startswith(str(site)) for path in done.stdout.split()), done.stdout


def test_the_readme_names_files_and_commands_that_exist():
    links = re.findall(r"\]\((?!https?://)([^)#]+)\)", README)
    assert len(links) > 8
    for link in links:
        assert (ROOT / link).is_file(), link
    for verb in VERBS:
        assert verb in README, verb
    assert set(re.findall(r"`lvnas ([a-z]+)", README)) <= set(VERBS)
    tour = README.split("## Reading the code")[1]
    assert len(re.findall(r"^\d\. ", tour, flags=re.M)) <= 6


def test_the_readme_s_count(lvnas):
    command, _, printed = re.search(r"\$ (lvnas params .*)(\n)(.*)", README).groups()
    code, out, _ = lvnas(*command.split()[1:])
    assert (code, out.strip()) == (0, printed)


def test_nothing_of_the_workplace_is_in_the_repository():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    for line in tracked.stdout.splitlines():
        if Path(line).suffix in (".py", ".md", ".toml", ".txt", "") and line != "tests/test_packaging.py":
            text = (ROOT / line).read_text(errors="ignore")
            assert "/work/" not in text, line
