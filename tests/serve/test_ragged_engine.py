"""Ragged LoRA end to end in float32: the ids of stock vLLM and of PEFT, capacity, refusals, roll-back."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from ragged_models import QWEN_IMAGES, VOCABULARY, Peft, adapter, llama, phi3, qwen2_vl, run_job

from lvnas.adapters import read_adapter
from lvnas.pack import pack
from lvnas.prepare import PackOptions
from lvnas_vllm.ragged.arena import aligned

ENGINE = {"enable_lora": True, "max_lora_rank": 16, "max_model_len": 192, "max_num_seqs": 8, "max_loras": 3}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return llama(tmp_path_factory.mktemp("ragged") / "llama")


@pytest.fixture(scope="module")
def adapters(base) -> dict[str, Path]:
    made = {f"a{i}": adapter(base, base.parent / f"a{i}", i) for i in range(5)}
    made["head"] = adapter(base, base.parent / "head", 9, share=0.3, also=("lm_head",))
    return made


def requests(seed, names, count):
    draw = random.Random(seed)
    return [
        [[draw.randrange(VOCABULARY - 8) for _ in range(draw.choice((1, 2, 5, 40, 90)))], draw.choice(names)]
        for _ in range(count)
    ]


def test_ids_equal_stock_and_peft_with_eviction_reuse_and_mixed_batches(tmp_path, base, adapters):
    names = [None, *adapters]
    batches = [requests(seed, names, 20) for seed in range(3)]
    steps = [["generate", batch, 8] for batch in batches]
    engine = {"model": str(base), "max_cpu_loras": 4, **ENGINE}
    ragged, log = run_job(tmp_path / "1", True, [*steps, ["state"]], adapters, **engine)
    stock, _ = run_job(tmp_path / "0", False, steps, adapters, **engine)
    oracle = Peft(base, adapters)
    for batch, ours, theirs in zip(batches, ragged, stock, strict=False):
        for (prompt, name), (ids, logprobs), (stock_ids, stock_logprobs) in zip(
            batch, ours, theirs, strict=True
        ):
            assert ids == stock_ids == oracle.greedy(prompt, name, ids), name
            assert max(abs(a - b) for a, b in zip(logprobs, stock_logprobs, strict=True)) < 5e-4
    state = ragged[-1]
    assert state["stock"] == [] and state["covered"] == 13 and len(state["active"]) <= 3
    assert "operators: native" in log or "operators: pure torch" in log
    assert "no adapter memory is set aside" in log


def own_elements(folder):
    """The adapter's own elements, from its file; alignment may add less than 2%."""
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118


def say(folder, **settings):
    """The adapter folder, its configuration changed."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return folder


def packed(out, adapters):
    """Name -> folder of each adapter in a `ragged` pack of them."""
    sources = [read_adapter(path, name) for name, path in adapters.items()]
    entries = pack(sources, out, PackOptions(layout="ragged"))["adapters"]
    return {entry["name"]: out / entry["path"] for entry in entries}


def test_capacity_from_the_manifest_refusals_and_roll_back(tmp_path, base, adapters):
    small = {name: adapters[name] for name in ("a0", "a1")}
    big = adapter(base, tmp_path / "big", 50, ranks=(16,), share=1)
    embedding = adapter(base, tmp_path / "embedding", 51, share=0.2, also=("model.embed_tokens",))
    lying = say(adapter(base, tmp_path / "lying", 52, ranks=(32,), share=0.2), rank_pattern={})
    everything = {**packed(tmp_path / "pack", small), "big": big, "embedding": embedding, "lying": lying}
    ask = requests(5, [None, "a0"], 4)
    steps = [
        ["state"],
        ["load_and_fail", "a0"],
        ["state"],
        ["load", "a0"],
        ["load", "a1"],
        ["load", "big"],
        ["generate", ask, 6],
        ["generate", [[[1, 2, 3], "big"]], 4],
        ["generate", ask, 6],
        ["load", "embedding"],
        ["load", "lying"],
        ["unload", "a1"],
        ["state"],
        ["unload", "a0"],
        ["state"],
    ]
    environment = {"LVNAS_PACK": str(tmp_path / "pack")}
    engine = {"model": str(base), **ENGINE, "max_loras": 2}
    results, log = run_job(tmp_path / "job", True, steps, everything, environment, **engine)
    at_start, broken, after_break, a0, a1, refused, good, in_request, still_good, vocabulary, above, *rest = (
        results
    )
    own = sum(own_elements(path) for path in small.values())
    assert own <= at_start["capacity"] <= 1.02 * own + 64
    assert (
        "the transfer broke" in broken["error"] and after_break["active"] == [] and after_break["table"] == 0
    )
    assert a0 is True and a1 is True
    needed = re.search(
        r"needs (\d+) bytes at its own ranks, (\d+) are free of a capacity of (\d+)", refused["error"]
    )
    assert int(needed[1]) >= 4 * own_elements(big) and int(needed[3]) == 4 * at_start["capacity"]
    assert 0 <= int(needed[2]) < int(needed[1])
    assert "adapter refused" in in_request["error"], (
        "a request for it is refused when it comes, not in a step"
    )
    assert good == still_good
    oracle = Peft(base, small)
    for (prompt, name), (ids, _) in zip(ask, good, strict=True):
        assert ids == oracle.greedy(prompt, name, ids)
    assert "input embedding" in vocabulary["error"]
    assert "a module of rank 32, above --max-lora-rank 16" in above["error"]
    _, without_a1, _, empty = rest
    assert without_a1["admitted"] == ["a0"] and without_a1["used"] > 0
    assert empty["used"] == empty["table"] == 0 and empty["admitted"] == empty["active"] == []
    line = re.search(
        r"adapters take ([\d.]+) MiB; padded slots would take ([\d.]+) MiB .*: (-?\d+) KV-cache", log
    )
    assert float(line[2]) > float(line[1]) and int(line[3]) > 0


def test_every_slot_at_the_highest_rank_and_prompt_log_probabilities(tmp_path, base):
    """Rank 1 of a head of 264 columns needs alignment; vLLM asks for prompt log-probabilities request by request,
    with fewer rows than the step has requests."""
    adapters = {
        f"full{i}": say(adapter(base, tmp_path / f"full{i}", i, ranks=(1,), share=1, also=("lm_head",)), r=1)
        for i in range(3)
    }
    asks = [[[7, 8 + i, 9], name] for i, name in enumerate([*adapters, None, *adapters, *adapters])]
    steps = [*(["load", name] for name in adapters), ["generate", asks, 4, 1], ["generate", asks, 4]]
    engine = {**ENGINE, "max_lora_rank": 1, "max_cpu_loras": 3}
    (*loaded, with_prompts, without), log = run_job(
        tmp_path / "job", True, steps, adapters, model=str(base), **engine
    )
    assert loaded == [True] * 3
    assert [ids for ids, _ in with_prompts] == [ids for ids, _ in without]
    oracle = Peft(base, adapters)
    for (prompt, name), (ids, _) in zip(asks, without, strict=True):
        assert ids == oracle.greedy(prompt, name, ids), name
    assert "prompt log-probabilities leave out LoRA on the output head" in log


def test_adapter_memory_that_cannot_hold_the_pack_is_refused_at_start(tmp_path, base, adapters):
    packed(tmp_path / "pack", {name: path for name, path in adapters.items() if name != "head"})
    environment = {"LVNAS_PACK": str(tmp_path / "pack"), "LVNAS_ADAPTER_MEMORY": "1000"}
    with pytest.raises(AssertionError, match=r"is 1000 bytes, but the 3 largest adapters of .* need \d+"):
        run_job(tmp_path / "job", True, [], {}, environment, model=str(base), **ENGINE)


def test_alignment_is_the_only_overhead():
    assert aligned(33) - 33 < 32


def test_fused_projections(tmp_path):
    """Phi-3: one adapter slice for a layer that other models cut into three."""
    base = phi3(tmp_path / "phi3")
    adapters = {f"v{i}": adapter(base, tmp_path / f"v{i}", 20 + i) for i in range(3)}
    asks = requests(3, [None, *adapters], 12)
    engine = {"model": str(base), **ENGINE, "max_loras": 2}
    (ours, state), _ = run_job(tmp_path / "job", True, [["generate", asks, 6], ["state"]], adapters, **engine)
    oracle = Peft(base, adapters)
    for (prompt, name), (ids, _) in zip(asks, ours, strict=True):
        assert ids == oracle.greedy(prompt, name, ids), name
    assert state["stock"] == []


def test_another_vision_language_model(tmp_path):
    """Qwen2-VL: images, LoRA in vLLM's own vision tower and merger, three adapters in two slots."""
    torchvision = Path(sys.prefix, "opt/torchvision")
    if not torchvision.is_dir():
        pytest.importorskip("torchvision", reason="vLLM loads no Qwen2-VL without torchvision")
    base = qwen2_vl(tmp_path / "qwen2-vl")
    adapters = {f"v{i}": adapter(base, tmp_path / f"v{i}-vl", 20 + i) for i in range(3)}
    config = json.loads((base / "config.json").read_text())
    start, pad, end = (config[f"{name}_token_id"] for name in ("vision_start", "image", "vision_end"))
    asks = requests(3, [None, *adapters], 16)
    draw = random.Random(4)
    for i, ask in enumerate(asks):
        if i % 4:
            size = draw.choice(((56, 56), (56, 84), (112, 84)))
            Image.effect_noise(size, 90).convert("RGB").rotate(i).save(file := tmp_path / f"{i}.png")
            ask[0], ask[2:] = [start, pad, end, *ask[0]], [str(file)]
    engine = {"model": str(base), **ENGINE, "max_loras": 2, "enable_tower_connector_lora": True}
    engine["limit_mm_per_prompt"] = {"image": 1, "video": 0}
    environment = {"PYTHONPATH": str(torchvision)} if torchvision.is_dir() else {}
    steps = [["generate", asks, 6], ["state"]]
    (ours, state), _ = run_job(tmp_path / "job", True, steps, adapters, environment, **engine)
    oracle = Peft(base, adapters)
    for (prompt, name, *images), (ids, _) in zip(asks, ours, strict=True):
        inputs = {}
        for image in images:
            inputs = QWEN_IMAGES(images=[Image.open(image)], return_tensors="pt")
            prompt = [start, *[pad] * (int(inputs["image_grid_thw"].prod()) // 4), *prompt[2:]]
            inputs["mm_token_type_ids"] = (torch.tensor([[*prompt, *ids]]) == pad).int()
        assert ids == oracle.greedy(prompt, name, ids, **inputs), (name, images)
    assert state["stock"] == [] and state["covered"] == 22


@pytest.mark.full
@pytest.mark.parametrize(
    ("base", "suite"), [("", ["test_parity.py", "test_packed_adapters.py"]), ("tiny", ["test_parity.py"])]
)
def test_mllama_parity_suite_with_ragged_lora(base, suite):
    """Eight adapters in three slots, images, mixed batches; on random weights and on the trained base `tiny`."""
    environment = {**os.environ, "LVNAS_RAGGED": "1", "LVNAS_TEST_BASE": base}
    files = [Path(__file__).with_name(name) for name in suite]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "not full", *files],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
