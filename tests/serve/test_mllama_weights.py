"""The real 11B and 90B checkpoints' names, on the meta device: each used exactly once, every parameter filled."""

import math
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from lvnas import bases

TO_HUB = {
    "model.vision_model.": "vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
}


def hub_name(name: str) -> str:
    prefix = next(prefix for prefix in TO_HUB if name.startswith(prefix))
    return TO_HUB[prefix] + name.removeprefix(prefix)


@pytest.fixture(scope="module", params=["llama-3.2-11b-vision", "llama-3.2-90b-vision"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """transformers' model and the served one, both without weights."""
    from checkpoints import CHAT_TEMPLATE, make_tokenizer
    from transformers import MllamaImageProcessorPil, MllamaProcessor
    from vllm.config import CacheConfig, DeviceConfig, ModelConfig, VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.distributed.parallel_state import model_parallel_is_initialized
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    folder: Path = tmp_path_factory.mktemp("config")
    config = bases.base_config(request.param)
    config.architectures = ["MllamaForConditionalGeneration"]
    config.save_pretrained(folder)
    MllamaProcessor(MllamaImageProcessorPil(), make_tokenizer(), chat_template=CHAT_TEMPLATE).save_pretrained(
        folder
    )
    engine = VllmConfig(
        model_config=ModelConfig(str(folder), dtype="bfloat16", max_model_len=1024),
        cache_config=CacheConfig(),
        device_config=DeviceConfig("cpu"),
    )
    from lvnas_vllm.mllama import MllamaForConditionalGeneration

    with set_current_vllm_config(engine):
        if not model_parallel_is_initialized():
            init_distributed_environment(1, 0, f"file://{folder}/store", 0, "gloo")
            initialize_model_parallel()
        with torch.device("meta"):
            served = MllamaForConditionalGeneration(vllm_config=engine)
    return bases.meta_model(request.param), served


@pytest.mark.parametrize("layout", ["hub", "transformers-5"])
def test_every_name_is_used_once_and_every_parameter_filled(models, layout: str) -> None:
    source, served = models
    named = {hub_name(name) if layout == "hub" else name: w for name, w in source.state_dict().items()}
    filled: dict[str, int] = defaultdict(int)
    for name, weight in named.items():
        target = served.hf_to_vllm_mapper.map_name(name)
        assert target is not None, f"{name} is dropped"
        filled[target] += weight.numel()
    parameters = dict(served.named_parameters())
    assert filled.keys() == parameters.keys()
    vocabulary = {"lm_head.weight", "model.language_model.embed_tokens.weight"}
    for name, parameter in parameters.items():
        if name in vocabulary:  # padded to a multiple of 64 rows
            rows = math.ceil(filled[name] / parameter.shape[1] / 64) * 64
            assert parameter.shape[0] == rows, name
        else:
            assert filled[name] == parameter.numel(), name
    assert served.load_weights(iter(named.items())) == set(parameters)


def test_a_missing_or_foreign_weight_is_an_error(models) -> None:
    _, served = models
    with pytest.raises(ValueError, match="no_such"):
        served.load_weights([("language_model.model.layers.0.no_such.weight", torch.empty(1, device="meta"))])
