"""The Python API: on four architectures, and in a Trainer as the docs show it."""

import json

import numpy as np
import pytest
import search_models as models
import torch
from peft import PeftModel, get_peft_model

import lvnas
from lvnas.allocate import Budget
from lvnas.errors import InputError

FAMILIES = {
    "mllama": (models.mllama, models.mllama_batch),
    "llama": (models.llama, models.text_batch),
    "qwen2_vl": (models.qwen2_vl, models.qwen2_vl_batch),
    "vit": (models.vit, models.vit_batch),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_standard_config_for_any_architecture(family, tmp_path):
    make, make_batch = FAMILIES[family]
    model = make()
    before = {name: (p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    random = torch.get_rng_state()
    config = lvnas.find_ranks(
        model,
        [make_batch(seed) for seed in range(6)],
        budget=Budget(like_uniform=2),
        ranks=[0, 1, 2, 4, 8],
        steps=6,
        learning_rate=1e-2,
        progress=False,
    )
    assert torch.equal(torch.get_rng_state(), random)
    assert all(
        torch.equal(p, before[n][0]) and p.requires_grad == before[n][1] for n, p in model.named_parameters()
    )
    gains = config.lvnas_gains
    assert np.isfinite(gains.values).all() and (gains.errors > 0).any()
    peft = get_peft_model(model, config)
    trainable = sum(p.numel() for p in peft.parameters() if p.requires_grad)
    uniform = 2 * sum(sum(shape) for shape in gains.shapes.values())
    assert 0.995 * uniform <= trainable <= uniform
    assert {layer.scaling["default"] for layer in peft.modules() if hasattr(layer, "lora_A")} == {1.0}
    for weight in peft.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.1)
    peft.save_pretrained(tmp_path)
    assert "lvnas_gains" not in json.loads((tmp_path / "adapter_config.json").read_text())
    again = PeftModel.from_pretrained(make(), tmp_path)
    batch = make_batch()
    assert again(**batch).loss == peft.eval()(**batch).loss


SETTINGS = {"budget": Budget(like_uniform=2), "ranks": [0, 1, 2, 4, 8], "steps": 6, "learning_rate": 1e-2}
SETTINGS |= {"progress": False}


@pytest.mark.parametrize("family", ["mllama", "qwen2_vl"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_finds_the_same_ranks(family, reentrant):
    make, make_batch = FAMILIES[family]
    batches = [make_batch(seed) for seed in range(6)]
    expected = lvnas.find_ranks(make(), batches, **SETTINGS)
    model = make()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = lvnas.find_ranks(model, batches, **SETTINGS)
    np.testing.assert_allclose(found.lvnas_gains.values, expected.lvnas_gains.values, rtol=1e-3, atol=1e-7)
    assert found.rank_pattern == expected.rank_pattern
    assert model.is_gradient_checkpointing


@pytest.mark.parametrize("method", ["score", "darts", "adalora", "eva"])
def test_bfloat16_bases(method):
    model = models.mllama().to(torch.bfloat16)
    batches = [models.mllama_batch(seed) for seed in range(6)]
    for batch in batches:
        batch["pixel_values"] = batch["pixel_values"].to(torch.bfloat16)
    config = lvnas.find_ranks(model, batches, method=method, **SETTINGS)
    gains = config.lvnas_gains
    assert np.isfinite(gains.values).all() and np.ptp(gains.values) > 0
    trainable = sum(p.numel() for p in get_peft_model(model, config).parameters() if p.requires_grad)
    uniform = 2 * sum(sum(shape) for shape in gains.shapes.values())
    assert 0.995 * uniform <= trainable <= uniform


@pytest.mark.parametrize("method", ["darts", "svd", "adalora"])
def test_repeats_give_standard_errors(method):
    batches = [models.mllama_batch(seed) for seed in range(6)]
    settings = SETTINGS | {"method": method}
    repeated = lvnas.find_ranks(models.mllama(), batches, repeats=3, **settings).lvnas_gains
    single = [lvnas.find_ranks(models.mllama(), batches, seed=n, **settings).lvnas_gains for n in range(3)]
    values = np.stack([gains.values for gains in single])
    np.testing.assert_allclose(repeated.values, values.mean(axis=0))
    np.testing.assert_allclose(repeated.errors, values.std(axis=0, ddof=1) / 3**0.5)
    assert (repeated.errors[:, 1:] > 0).any()


@pytest.mark.full
@pytest.mark.parametrize("kind", ["int8", "fp4", "nf4 twice, bfloat16"])
def test_quantised_bases(kind, tmp_path):
    """Skipped without the extra `quantised`: importing PEFT takes two seconds longer beside bitsandbytes."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantisation = {
        "int8": {"load_in_8bit": True},
        "fp4": {"load_in_4bit": True},
        "nf4 twice, bfloat16": {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": torch.bfloat16,
        },
    }[kind]
    models.llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(**quantisation), device_map="cpu"
    )
    batch = models.text_batch()
    before = model(**batch).loss
    batches = [models.text_batch(seed) for seed in range(6)]
    config = lvnas.find_ranks(model, batches, **SETTINGS)
    gains = config.lvnas_gains
    assert gains.shapes["model.layers.0.mlp.down_proj"] == (128, 64)  # as in the base, not as it is packed
    assert np.isfinite(gains.values).all() and (gains.values > 0).any()
    assert model(**batch).loss == before
    trainable = sum(p.numel() for p in get_peft_model(model, config).parameters() if p.requires_grad)
    uniform = 2 * sum(sum(shape) for shape in gains.shapes.values())
    assert 0.995 * uniform <= trainable <= uniform


def test_five_lines_in_a_trainer(tmp_path):
    from transformers import Trainer, TrainingArguments

    examples = [{name: value[0] for name, value in models.text_batch(seed, 1).items()} for seed in range(8)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True
    )

    model = models.llama()
    loader = torch.utils.data.DataLoader(examples, batch_size=2)
    config = lvnas.find_ranks(model, loader, budget=2016, ranks=[0, 1, 2, 4], steps=5)
    trainer = Trainer(get_peft_model(model, config), arguments, train_dataset=examples)
    trainer.train()

    assert trainer.state.global_step == 2


def test_five_lines_in_trl(tmp_path):
    """The example of docs/search.md: the loader is the trainer's own, so that the search sees what training will."""
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    vocabulary = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", *"abcdefghij"])}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")
    data = Dataset.from_list([{"prompt": "a b c d ", "completion": "e f g"}] * 8)
    arguments = SFTConfig(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        bf16=False,
    )
    setting = {"args": arguments, "train_dataset": data, "processing_class": tokenizer}

    model = models.llama()
    loader = SFTTrainer(model, **setting).get_train_dataloader()
    config = lvnas.find_ranks(model, loader, budget=2016, ranks=[0, 1, 2, 4], steps=5)
    trainer = SFTTrainer(model, **setting, peft_config=config)
    trainer.train()

    assert trainer.state.global_step == 2
    assert sum(p.numel() for p in trainer.model.parameters() if p.requires_grad) == 2016
    trainer.save_model(str(tmp_path / "adapter"))
    assert PeftModel.from_pretrained(models.llama(), tmp_path / "adapter").peft_config[
        "default"
    ].rank_pattern == dict(config.rank_pattern)


@pytest.mark.parametrize(
    ("method", "order"),
    [("score", [*range(6)]), ("svd", [*range(6)]), ("eva", [*range(6)]), ("darts", [*range(4)] * 3)],
)
def test_every_batch_is_used(method, order):
    """`darts` trains on the even ones and chooses on the odd ones; here four for it, seven for the others."""
    batches = [models.text_batch(seed) for seed in range(4 if method == "darts" else 7)]
    model, seen = models.llama(), []

    def look(_module, _arguments, inputs):
        seen.append(
            next(n for n, b in enumerate(batches) if torch.equal(b["input_ids"], inputs["input_ids"]))
        )

    model.register_forward_pre_hook(look, with_kwargs=True)
    lvnas.find_ranks(model, batches, method=method, **SETTINGS)
    assert seen == order


def test_the_paper_s_mode_needs_no_budget():
    config = lvnas.find_ranks(
        models.llama(),
        [models.text_batch(seed) for seed in range(4)],
        method="darts",
        steps=3,
        progress=False,
    )
    assert set(config.rank_pattern.values()) <= {4, 8, 16, 32, 64}


def test_bad_input():
    batches = [models.text_batch(seed) for seed in range(4)]
    with pytest.raises(InputError, match="at least 2"):
        lvnas.find_ranks(models.llama(), batches[:1], budget="2k")
    with pytest.raises(InputError, match=r"match no linear module of this model.*its modules: down_proj"):
        lvnas.find_ranks(models.llama(), batches, budget="2k", targets=["query"])
    for bad in ("meta-llama/Llama-3.2-11B-Vision", torch.nn.ReLU()):
        with pytest.raises(InputError, match="without parameters; expected a torch"):
            lvnas.find_ranks(bad, batches, budget="2k")
    with pytest.raises(InputError, match="a batch is a tuple; expected what"):
        lvnas.find_ranks(models.llama(), [(torch.ones(1),)] * 2, budget="2k")
    for settings, said in (
        ({"steps": 0}, "steps is 0"),
        ({"steps": "60"}, "steps is '60'; it must be a whole number"),
        ({"repeats": 1.5}, "repeats is 1.5"),
        ({"learning_rate": -1.0}, "learning rate -1.0"),
        ({"learning_rate": "1e-3"}, "learning rate '1e-3' is not a number"),
        ({"seed": 0.5}, "seed 0.5 is not a whole number"),
        ({"options": {"rate": 1}}, "method 'score' has no option 'rate'; allowed: none"),
    ):
        with pytest.raises(InputError, match=said):
            lvnas.find_ranks(models.llama(), batches, budget="2k", **settings)
    with pytest.raises(InputError, match="rank 100000 is above 16384"):
        lvnas.find_ranks(models.llama(), batches, budget="2k", ranks=[0, 100000])
    with pytest.raises(InputError, match="a batch has x; it needs labels"):
        lvnas.find_ranks(models.llama(), [{"x": torch.ones(1)}] * 2, budget="2k")
    with pytest.raises(InputError, match="repeats is 0"):
        lvnas.find_ranks(models.llama(), batches, budget="20k", repeats=0)
    with pytest.raises(InputError, match="needs a budget"):
        lvnas.find_ranks(models.llama(), batches, steps=5, progress=False)
    with pytest.raises(InputError, match="cannot be reached; this space and these targets reach"):
        lvnas.find_ranks(models.llama(), batches, budget="1G", steps=5, progress=False)
