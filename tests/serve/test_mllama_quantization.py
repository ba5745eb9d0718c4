"""Quantised checkpoints as the Hub holds them: layer names, and answers as the rounded weights give them."""

from pathlib import Path

import pytest
from variant import run

from lvnas_vllm.mllama_quantization import rename_layer, rename_layers

HUB_LISTS = {
    "expressions": ["re:.*lm_head", "re:multi_modal_projector.*", "re:vision_model.*"],
    "names": ["multi_modal_projector", "language_model.lm_head"],
    "parts": ["vision_model", "multi_modal_projector", "lm_head"],
}
"""How checkpoints name the layers to leave alone: llm-compressor's recipes and files, and AWQ's."""


@pytest.mark.parametrize(
    ("name", "wanted"),
    {
        "vision_model.transformer.layers.0.mlp.fc1": "model.vision_model.transformer.layers.0.mlp.fc1",
        "multi_modal_projector": "model.multi_modal_projector",
        "language_model.lm_head": "lm_head",
        "language_model.model.layers.3.cross_attn.k_proj": "model.language_model.layers.3.cross_attn.k_proj",
        "model.language_model.layers.3.mlp.up_proj": "model.language_model.layers.3.mlp.up_proj",
        "lm_head": "lm_head",
        "Linear": "Linear",
        "re:vision_model.*": r"re:model\.vision_model.*",
        "re:^multi_modal_projector$": r"re:^model\.multi_modal_projector$",
        r"re:language_model\.model\.layers\.0\..*": r"re:model\.language_model\.layers\.0\..*",
        "re:.*language_model.model.layers.*": "re:.*language_model.layers.*",
        "re:.*lm_head": "re:.*lm_head",
    }.items(),
)
def test_layer_names_of_the_hub_become_this_models(name: str, wanted: str) -> None:
    assert rename_layer(name) == wanted
    assert rename_layer(wanted) == wanted


def test_every_list_of_layers_is_renamed() -> None:
    groups = {"group_0": {"targets": ["Linear", "re:language_model.model.*"], "weights": {"num_bits": 8}}}
    given = {
        "ignore": ["vision_model.a"],
        "modules_to_not_convert": ["vision_model"],
        "config_groups": groups,
    }
    assert rename_layers(given) == {
        "ignore": ["model.vision_model.a"],
        "modules_to_not_convert": ["model.vision_model"],
        "config_groups": {
            "group_0": {"targets": ["Linear", r"re:model\.language_model.*"], "weights": {"num_bits": 8}}
        },
    }
    assert given["ignore"] == ["vision_model.a"]


def test_four_bit_weights_with_an_adapter(tmp_path: Path) -> None:
    """Weights only: float16 answers as close to the rounded weights' as float16 is."""
    result = run(
        tmp_path,
        adapters=["everything"],
        engine={"dtype": "float16"},
        quantised={"scheme": "int4", "ignore": HUB_LISTS["expressions"]},
    )
    assert result["mean"] < 0.01 and result["worst"] < 0.03, result


@pytest.mark.full
def test_eight_bit_weights_and_inputs_with_an_adapter(tmp_path: Path) -> None:
    """The vision transformers too. Inputs are rounded: a change of 1e-6 in the embeddings moves the oracle by 0.03."""
    result = run(
        tmp_path, adapters=["everything"], quantised={"scheme": "int8", "ignore": HUB_LISTS["names"]}
    )
    assert result["mean"] < 0.05 and result["worst"] < 0.15, result


@pytest.mark.full
def test_awq_weights_with_an_adapter(tmp_path: Path) -> None:
    quantised = {"scheme": "awq", "ignore": HUB_LISTS["parts"]}
    result = run(tmp_path, adapters=["everything"], engine={"dtype": "float16"}, quantised=quantised)
    assert result["mean"] < 0.01 and result["worst"] < 0.03, result
