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
        options={"batches": 4},
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


def test_five_lines_in_a_trainer(tmp_path):
    from transformers import Trainer, TrainingArguments

    examples = [{name: value[0] for name, value in models.text_batch(seed, 1).items()} for seed in range(8)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True
    )

    model = models.llama()
    loader = torch.utils.data.DataLoader(examples, batch_size=2)
    config = lvnas.find_ranks(model, loader, budget=2016, ranks=[0, 1, 2, 4], steps=4, options={"batches": 3})
    trainer = Trainer(get_peft_model(model, config), arguments, train_dataset=examples)
    trainer.train()

    assert trainer.state.global_step == 2


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
    with pytest.raises(InputError, match="needs a budget"):
        lvnas.find_ranks(models.llama(), batches, steps=2, progress=False)
    with pytest.raises(InputError, match="cannot be reached; this space and these targets reach"):
        lvnas.find_ranks(models.llama(), batches, budget="1G", steps=2, progress=False)
