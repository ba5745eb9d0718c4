"""`lvnas serve` up to the moment it becomes vLLM: what it checks, and the command it makes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lvnas.adapters import read_adapter
from lvnas.errors import InputError
from lvnas.pack import PackOptions, pack
from lvnas.serve import NO_DOMAIN, Launch, ServeOptions, plan


@pytest.fixture
def packed(checkpoint: Path, adapters: dict[str, Path], tmp_path: Path):
    def make(layout: str = "pad", *names: str) -> Path:
        chosen = [read_adapter(adapters[name], name) for name in names or ("everything", "vision-1")]
        pack(chosen, tmp_path / layout, PackOptions(layout=layout), base=str(checkpoint))
        return tmp_path / layout

    return make


def value(launch: Launch, flag: str) -> str:
    assert launch.argv.count(flag) == 1, launch.argv
    return launch.argv[launch.argv.index(flag) + 1]


def test_a_pack_is_served_with_its_settings_and_safe_defaults(packed, checkpoint: Path) -> None:
    folder = packed()
    launch = plan([str(folder)], ServeOptions())
    assert value(launch, "--host") == "127.0.0.1"
    assert value(launch, "--allowed-media-domains") == NO_DOMAIN
    assert (value(launch, "--max-loras"), value(launch, "--max-lora-rank")) == ("2", "16")
    assert value(launch, "--served-model-name") == str(checkpoint) == launch.base
    assert value(launch, "--max-model-len") == "2048"
    assert "--enable-tower-connector-lora" in launch.argv
    assert set(launch.adapters) == {"everything", "vision-1"}
    assert all(path.parent == folder / "adapters" for path in launch.adapters.values())
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in launch.env
    assert int(launch.env["VLLM_MAX_IMAGE_PIXELS"]) == 4096 * 4096


def test_flags_of_vllm_pass_through_and_override(packed) -> None:
    flags = ["--host", "0.0.0.0", "--max_model_len=512", "--max-loras", "1", "--tensor-parallel-size", "2"]
    launch = plan([str(packed())], ServeOptions(flags=flags, runtime_adapters=True))
    assert launch.argv[-len(flags) :] == flags
    assert "--max-model-len" not in launch.argv
    assert (value(launch, "--host"), value(launch, "--max-loras")) == ("0.0.0.0", "1")
    assert launch.env["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"


@pytest.mark.parametrize("flag", ["--gpu-memory-utilization=0.2", "--kv_cache_memory_bytes=1G"])
def test_a_memory_limit_among_the_flags_is_the_one_that_counts(packed, monkeypatch, flag: str) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    folder = str(packed())
    assert plan([folder], ServeOptions()).env["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert "VLLM_CPU_KVCACHE_SPACE" not in plan([folder], ServeOptions(flags=[flag])).env


def test_adapter_folders_get_a_legal_rank(adapters: dict[str, Path], checkpoint: Path) -> None:
    launch = plan([f"kv={adapters['cross-kv-1']}"], ServeOptions(base=str(checkpoint)))
    assert value(launch, "--max-lora-rank") == "8"  # rank 4: the next that vLLM allows
    assert value(launch, "--lora-modules") == f"kv={adapters['cross-kv-1']}"


def test_a_base_without_adapters_has_no_lora(checkpoint: Path) -> None:
    assert "--enable-lora" not in plan([], ServeOptions(base=str(checkpoint))).argv


def test_a_ragged_pack_switches_its_execution_on(packed) -> None:
    folder = packed("ragged")
    launch = plan([str(folder)], ServeOptions(adapter_memory="64MiB"))
    assert launch.env["LVNAS_RAGGED"] == "1"
    assert (launch.env["LVNAS_PACK"], launch.env["LVNAS_ADAPTER_MEMORY"]) == (str(folder), "64MiB")


def test_a_group_is_one_engine(packed) -> None:
    folder = packed("group", "everything", "cross-kv-1")
    launch = plan([str(folder)], ServeOptions(group="rank-8"))
    assert (list(launch.adapters), value(launch, "--max-lora-rank")) == (["cross-kv-1"], "8")
    with pytest.raises(InputError, match="rank-8, rank-16"):
        plan([str(folder)], ServeOptions())


def test_the_semantics_of_the_adapters_are_served(
    adapters: dict[str, Path], checkpoint: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(adapters["vision-1"], tmp_path / "other")
    metadata = {"format": "lvnas-adapter/1", "vision_features": "transformers"}
    (other / "lvnas.json").write_text(json.dumps(metadata))
    options = ServeOptions(base=str(checkpoint))
    assert json.loads(value(plan([str(other)], options), "--hf-overrides")) == {
        "vision_features": "transformers"
    }
    mixed = plan([str(other), str(adapters["vision-2"])], options)
    assert "--hf-overrides" not in mixed.argv
    assert any("other was trained with vision_features=transformers" in note for note in mixed.notes)


def corrupt(folder: Path) -> None:
    weights = next(folder.glob("adapters/*/adapter_model.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(bytes(data))


def test_a_damaged_pack_is_refused_with_file_and_reason(packed) -> None:
    folder = packed()
    corrupt(folder)
    with pytest.raises(InputError, match=r"adapter_model\.safetensors: hash-mismatch"):
        plan([str(folder)], ServeOptions())


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"serve": {"a": [1]}}, "serve of the pack"), ({"layout": "group"}, "groups of the pack is missing")],
)
def test_a_manifest_that_is_wrong_is_refused_by_its_value(packed, changes, message: str) -> None:
    manifest = packed() / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | changes))
    with pytest.raises(InputError, match=rf"manifest\.json: bad-manifest: {message}"):
        plan([str(manifest.parent)], ServeOptions())


def test_an_adapter_of_another_base_is_refused(adapters: dict[str, Path]) -> None:
    with pytest.raises(InputError, match=r"adapter_model\.safetensors: (shape-mismatch|not-in-base)"):
        plan([f"x={adapters['vision-1']}"], ServeOptions(base="llama-3.2-11b-vision"))


@pytest.mark.parametrize(
    ("sources", "base", "message"),
    [
        (["text={vision-1}"], "{base}", "would take over the base's own requests"),
        (["{vision-1}"], "nobody", "unknown base 'nobody'"),
        (["/no/such/folder"], "{base}", "/no/such/folder"),
        ([], None, "no base named"),
    ],
)
def test_bad_input_is_one_line(adapters, checkpoint: Path, sources, base, message: str) -> None:
    names = {"base": str(checkpoint), "vision-1": str(adapters["vision-1"])}

    def fill(text: str | None) -> str | None:
        for name, path in names.items():
            text = text and text.replace("{" + name + "}", path)
        return text

    with pytest.raises(InputError, match=message):
        plan([fill(source) for source in sources], ServeOptions(base=fill(base)))


def test_the_command_refuses_with_exit_code_2(packed) -> None:
    folder = packed()
    corrupt(folder)
    lvnas = [sys.executable, "-c", "from lvnas.cli import main; main()", "serve", str(folder), "--dry-run"]
    done = subprocess.run(lvnas, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "hash-mismatch" in done.stderr
