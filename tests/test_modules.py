import re

import pytest
from torch import nn
from transformers import MllamaConfig

from lvnas.bases import meta_model
from lvnas.errors import InputError
from lvnas.modules import canonical_name, find_targets, is_vision, module_of_key, rank_pattern_key


@pytest.fixture(scope="module")
def tiny():
    return meta_model("tiny")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            "base_model.model.vision_model.transformer.layers.0.mlp.fc1",
            "model.vision_model.transformer.layers.0.mlp.fc1",
        ),
        (
            "language_model.model.layers.3.cross_attn.k_proj",
            "model.language_model.layers.3.cross_attn.k_proj",
        ),
        (
            "base_model.model.model.language_model.layers.0.mlp.up_proj",
            "model.language_model.layers.0.mlp.up_proj",
        ),
        ("multi_modal_projector", "model.multi_modal_projector"),
        ("language_model.lm_head", "lm_head"),
    ],
)
def test_older_names_are_mapped(old, new):
    assert canonical_name(old) == new
    assert canonical_name(new) == new


def test_text_and_vision_part_all(tiny):
    everything, text, vision = (set(find_targets(tiny, group)) for group in ("all", "text", "vision"))
    assert text | vision == everything
    assert not text & vision
    assert all(is_vision(name) for name in vision)
    assert any("cross_attn.k_proj" in name for name in text)


def test_targets_can_be_mixed(tiny):
    one = "model.language_model.layers.0.self_attn.q_proj"
    chosen = find_targets(tiny, f"gud, fc1,{one}")
    assert one in chosen
    assert {name.rpartition(".")[2] for name in chosen} == {
        "gate_proj",
        "up_proj",
        "down_proj",
        "fc1",
        "q_proj",
    }
    assert all(isinstance(module, nn.Linear) for module in chosen.values())


def test_a_target_that_matches_nothing_names_what_there_is(tiny):
    with pytest.raises(InputError, match=r"'c_attn'.*gate_proj"):
        find_targets(tiny, "q_proj,c_attn")
    with pytest.raises(InputError, match="no target modules named"):
        find_targets(tiny, " , ")


def test_rank_pattern_keys_match_one_module_only(tiny):
    """PEFT searches each key at a name's end: three towers share the suffix layers.0.self_attn.q_proj."""
    names = list(find_targets(tiny, "all"))
    for name in names:
        pattern = re.compile(rf"(.*\.)?({rank_pattern_key(name)})$")
        assert [other for other in names if pattern.match(other)] == [name]
        assert module_of_key(rank_pattern_key(name)) == name


def test_peft_gives_each_module_its_own_rank():
    from peft import LoraConfig, get_peft_model

    from lvnas.bases.registry import model_class

    config = meta_model("tiny").config
    assert isinstance(config, MllamaConfig)
    model = model_class(config).from_config(config)
    names = [name for name in find_targets(model, "q_proj") if ".layers.0." in name]
    assert len(names) == 3
    ranks = {name: rank for rank, name in enumerate(names, 1)}
    keys = {rank_pattern_key(name): rank for name, rank in ranks.items()}
    peft_model = get_peft_model(model, LoraConfig(r=9, target_modules=names, rank_pattern=keys))
    made = {
        canonical_name(name.removesuffix(".lora_A.default")): module.out_features
        for name, module in peft_model.named_modules()
        if name.endswith("lora_A.default")
    }
    assert made == ranks


def test_layers_that_are_not_linear_are_named():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16))
    with pytest.raises(
        InputError, match=r"transformer\.h\.0\.attn\.c_attn is a Conv1D; .* torch\.nn\.Linear"
    ):
        find_targets(model, "c_attn")
