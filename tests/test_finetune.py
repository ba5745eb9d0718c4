"""Derive, fine-tune, evaluate and report on the tiny architecture: real files, few steps."""

import base64
import dataclasses
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from lvnas import bases
from lvnas.derive import derive_file
from lvnas.errors import InputError
from lvnas.evaluate import answer_loss, evaluate, generate
from lvnas.finetune import FinetuneConfig, finetune, load_adapter, warmup_cosine
from lvnas.modules import find_targets
from lvnas.ranks import RankPlan
from lvnas.tasks import load_task
from lvnas.tasks.batches import IGNORED, Collator

SHORT = FinetuneConfig(steps=6, batch_size=4, learning_rate=2e-3, save_every=2)


@pytest.fixture(scope="module")
def derived(raw_tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("derived")
    names = list(find_targets(bases.meta_model(str(raw_tiny)), "all"))
    ranks = {name: (1, 2, 3, 8)[place % 4] for place, name in enumerate(names)}
    RankPlan(ranks=ranks, base=str(raw_tiny), task="codewords", method="random", scale=2.0).write(
        folder / "ranks.json"
    )
    derive_file(folder / "ranks.json", folder / "adapter")
    return folder / "adapter"


@pytest.fixture(scope="module")
def trained(derived, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "codewords"
    report = finetune(derived, "codewords", out, SHORT)
    return out, report


def test_it_learns_and_records(trained, derived):
    out, report = trained
    assert len(report["losses"]) == 6
    assert report["losses"][-1] < report["losses"][0]
    assert report["epoch_seconds"] > 0
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (derived, out))
    assert {name: value.shape for name, value in before.items()} == {n: v.shape for n, v in after.items()}
    moved = [name for name in before if not torch.equal(before[name].float(), after[name].float())]
    assert len([name for name in moved if "lora_B" in name]) == len(before) // 2
    assert (out / "adapter_config.json").read_bytes() == (derived / "adapter_config.json").read_bytes()
    facts = json.loads((out / "lvnas.json").read_text())
    assert facts["task"] == "codewords"
    assert facts["finetune"]["losses"] == report["losses"]
    assert facts["provenance"]["derived"]["method"] == "random"
    assert sorted(path.name for path in out.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "lvnas.json",
    ]


def test_again_is_not_trained_again(trained, derived):
    out, report = trained
    stamp = (out / "adapter_model.safetensors").stat().st_mtime_ns
    assert finetune(derived, "codewords", out, SHORT)["losses"] == report["losses"]
    assert (out / "adapter_model.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(InputError, match="choose a new --out"):
        finetune(derived, "sum", out, SHORT)


def test_another_adapter_or_other_data_is_another_run(derived, tmp_path):
    """A changed scaling or a changed answer under the same name is no finished run."""
    other = tmp_path / "other"
    shutil.copytree(derived, other)
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 2 * config["lora_alpha"]}))
    rows = [
        {
            "images": [image_uri(number)],
            "texts": [{"user": "What?", "assistant": str(number)}],
        }
        for number in range(60)
    ]
    task = tmp_path / "task.jsonl"
    task.write_text("\n".join(map(json.dumps, rows)))
    short = dataclasses.replace(SHORT, steps=1)
    first = finetune(derived, str(task), tmp_path / "out", short)
    assert finetune(derived, str(task), tmp_path / "out", short) == first
    with pytest.raises(InputError, match="already holds another adapter"):
        finetune(other, str(task), tmp_path / "out", short)
    for row in rows:
        row["texts"][0]["assistant"] = "none"
    task.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(InputError, match="already holds another adapter"):
        finetune(derived, str(task), tmp_path / "out", short)


def image_uri(number):
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (4 * number, 0, 0)).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def test_what_a_kill_left_of_the_first_state_is_no_obstacle(derived, trained, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / ".finetune.pt.k1ll3d").write_bytes(b"half")
    assert finetune(derived, "codewords", out, SHORT)["losses"] == trained[1]["losses"]
    assert not (out / ".finetune.pt.k1ll3d").exists()


def test_an_adapter_of_an_older_transformers_is_loaded_whole(raw_tiny, tmp_path):
    """Before 4.52 the names began otherwise; PEFT would pass over such tensors with a warning."""
    names = list(find_targets(bases.meta_model(str(raw_tiny)), "all"))
    plan = RankPlan(ranks=dict.fromkeys(names, 2), base=str(raw_tiny), task="codewords")
    plan.write(tmp_path / "ranks.json")
    derive_file(tmp_path / "ranks.json", tmp_path / "adapter")
    weights = tmp_path / "adapter/adapter_model.safetensors"
    tensors = {name: torch.randn_like(value) for name, value in load_file(weights).items()}
    save_file({old_name(name): value for name, value in tensors.items()}, weights)
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    config |= {"rank_pattern": {}, "alpha_pattern": {}}
    config["target_modules"] = sorted({name.rpartition(".")[2] for name in names})
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    loaded = load_adapter(bases.load(str(raw_tiny))[0], tmp_path / "adapter").state_dict()
    for name, value in tensors.items():
        assert old_name(name) != name
        assert torch.equal(loaded[name.replace(".weight", ".default.weight")], value), name


def old_name(name):
    return name.replace("model.vision_model.", "vision_model.").replace(
        "model.language_model.", "language_model.model."
    )


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("adapter_model.safetensors", b"", "adapter_model.safetensors: "),
        ("adapter_config.json", b"[]", "adapter_config.json: "),
        ("lvnas.json", b"[]", "lvnas.json: "),
        ("lvnas.json", b'{"format": "lvnas-adapter/1", "base": 5}', "base is 5, not text"),
        (
            "lvnas.json",
            b'{"format": "lvnas-adapter/1", "provenance": "y"}',
            "provenance is 'y', not an object",
        ),
    ],
)
def test_a_damaged_adapter_is_one_line(derived, raw_tiny, tmp_path, lvnas, file, content, said):
    shutil.copytree(derived, tmp_path / "adapter")
    (tmp_path / "adapter" / file).write_bytes(content)
    for command in (
        ["finetune", tmp_path / "adapter", "codewords", "--out", tmp_path / "out", "--base", raw_tiny],
        ["evaluate", tmp_path / "adapter", "--task", "codewords", "--base", raw_tiny],
    ):
        code, _, error = lvnas(*command)
        assert code == 2 and said in error and error.count("\n") == 1


def test_bad_numbers():
    for settings, said in (
        ({"learning_rate": float("nan")}, "learning rate nan"),
        ({"learning_rate": -1.0}, "learning rate -1.0"),
        ({"weight_decay": float("inf")}, "weight decay inf"),
        ({"seed": -1}, "seed -1"),
        ({"steps": 0}, "steps is 0"),
    ):
        with pytest.raises(InputError, match=said):
            FinetuneConfig(**settings)


def test_an_interrupted_run_goes_on_exactly(trained, derived, tmp_path, monkeypatch):
    """Stopped in step 5 of 6, after the state of step 4: the same weights as without the stop."""
    from lvnas.finetune import _Run

    whole = _Run._step

    def interrupted(self, step, batch):
        if step == 4:
            raise KeyboardInterrupt
        return whole(self, step, batch)

    out = tmp_path / "codewords"
    monkeypatch.setattr(_Run, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        finetune(derived, "codewords", out, SHORT)
    assert [path.name for path in out.iterdir()] == ["finetune.pt"]
    monkeypatch.setattr(_Run, "_step", whole)
    with pytest.raises(InputError, match="other settings"):
        finetune(derived, "codewords", out, dataclasses.replace(SHORT, seed=1))
    finetune(derived, "codewords", out, SHORT)
    wanted, got = (load_file(folder / "adapter_model.safetensors") for folder in (trained[0], out))
    for name, value in wanted.items():
        assert torch.equal(value, got[name]), name


def test_a_loss_that_is_not_finite_stops_with_the_state(derived, tmp_path):
    config = FinetuneConfig(steps=30, batch_size=4, learning_rate=1e30, clip=1e30)
    with pytest.raises(InputError, match=r"step \d+: the loss is .*lower the learning rate"):
        finetune(derived, "codewords", tmp_path / "out", config)
    assert (tmp_path / "out" / "finetune.pt").exists()


def test_the_schedule():
    factors = [warmup_cosine(step, 100) for step in range(100)]
    assert factors[0] == pytest.approx(0.2)
    assert max(factors) == pytest.approx(1)
    assert factors[-1] < 0.01
    assert factors[5:] == sorted(factors[5:], reverse=True)


def test_perplexity_is_the_mean_over_answer_tokens(raw_tiny):
    """Against a loop over single examples, without padding or batches."""
    model, processor = bases.load(str(raw_tiny))
    examples = load_task("locate", {"train": 0, "search": 0, "test": 5}).splits["test"]
    end = processor.tokenizer.convert_tokens_to_ids("<|eot_id|>")
    losses, ends = [], []
    for example in examples:
        batch = Collator(processor)([example])
        labels = batch.pop("labels")[0, 1:]
        with torch.no_grad():
            chances = model(**batch).logits[0, :-1].double().log_softmax(-1)
        for row, label in zip(chances, labels, strict=True):
            if label != IGNORED:
                (ends if label == end else losses).append(-row[label].item())
    without_end, with_end = answer_loss(model, processor, examples, 3)
    assert without_end == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert with_end == pytest.approx(sum(losses + ends) / len(losses + ends), abs=1e-5)
    assert len(ends) == 5


def test_batched_answers_equal_single_ones(raw_tiny):
    model, processor = bases.load(str(raw_tiny))
    examples = load_task("locate", {"train": 0, "search": 0, "test": 4}).splits["test"]
    together = generate(model, processor, examples, 4, new_tokens=8)
    alone = [generate(model, processor, [example], 1, new_tokens=8)[0] for example in examples]
    assert together == alone


def test_evaluate_and_report(trained, derived, tmp_path, lvnas):
    out, _ = trained
    results = evaluate([out], tmp_path / "results", examples=6)
    assert [result.adapter for result in results] == [None, "codewords"]
    base, adapter = results
    assert (base.parameters, base.examples) == (0, 6)
    plan = RankPlan.read(derived.parent / "ranks.json")
    model = bases.meta_model(plan.base)
    shapes = {name: (m.in_features, m.out_features) for name, m in find_targets(model, "all").items()}
    assert adapter.parameters == plan.parameters(shapes)
    assert adapter.method == "random"
    assert abs(adapter.loss - base.loss) > 1e-3
    code, printed, _ = lvnas("report", out, tmp_path / "results", "--out", tmp_path / "report")
    assert code == 0
    table = (tmp_path / "report" / "table.md").read_text()
    assert f"{adapter.parameters:,}" in table and f"{adapter.perplexity:.4f}" in table
    png = Path(printed.splitlines()[0])
    assert png.read_bytes().startswith(b"\x89PNG")


def test_bad_input(lvnas, tmp_path, derived, trained):
    for arguments, said in (
        (["finetune", tmp_path / "nowhere", "sum", "--out", tmp_path / "x"], "nowhere"),
        (["finetune", derived, "sums", "--out", tmp_path / "x"], "unknown task 'sums'; allowed: codewords"),
        (
            ["finetune", tmp_path, "sum", "--base", "tiny", "--out", tmp_path / "x"],
            "adapter_config.json: missing-file",
        ),
        (["evaluate"], "--base"),
        (["evaluate", tmp_path / "nowhere"], "nowhere"),
        (["evaluate", trained[0], "--task", "nope"], "unknown task 'nope'"),
        (["report", tmp_path], "adapter_config.json"),
    ):
        code, out, err = lvnas(*arguments)
        assert (code, out) == (2, ""), (arguments, err)
        assert said in err
        assert err.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_an_adapter_of_another_base_is_refused(tmp_path, derived, raw_tiny):
    model, _ = bases.load(str(raw_tiny))
    other = tmp_path / "other"
    other.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (other / name).write_bytes((derived / name).read_bytes())
    weights = load_file(other / "adapter_model.safetensors")
    first = next(name for name in weights if "lora_A" in name)
    weights[first] = torch.zeros(weights[first].shape[0], 7)
    save_file(weights, other / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"shape-mismatch: .* this base has"):
        load_adapter(model, other)
