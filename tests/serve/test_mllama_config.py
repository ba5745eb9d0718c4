"""What the engine is told about Llama-3.2-Vision before it is built, and which settings are refused."""

from pathlib import Path
from typing import Any

import pytest


def engine_config(checkpoint: Path, **options: Any):
    from vllm import EngineArgs

    return EngineArgs(str(checkpoint), dtype="float32", max_model_len=128, **options).create_engine_config()


def test_whole_images_are_admitted_and_nothing_is_compiled(checkpoint: Path) -> None:
    from vllm.config import CompilationMode

    options = {"max_num_batched_tokens": 128, "max_num_seqs": 4, "enable_lora": True}
    config = engine_config(checkpoint, limit_mm_per_prompt={"image": 8}, **options)
    tokens = 8 * 4 * 5  # images, tiles, patches with the class token
    assert config.model_config.hf_config.max_source_positions == tokens
    assert config.scheduler_config.max_num_batched_tokens == tokens
    assert config.scheduler_config.max_num_encoder_input_tokens >= tokens
    assert config.scheduler_config.encoder_cache_size >= tokens
    assert config.compilation_config.mode == CompilationMode.NONE
    assert config.compilation_config.custom_ops == ["all"]
    assert config.lora_config.enable_tower_connector_lora


def test_what_an_encoder_decoder_cannot_do_is_switched_off(checkpoint: Path) -> None:
    config = engine_config(checkpoint, enable_prefix_caching=True, enable_chunked_prefill=True)
    assert not config.scheduler_config.enable_chunked_prefill
    assert not config.cache_config.enable_prefix_caching


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit_mm_per_prompt": {"image": 0}}, r"image=0; allowed: 1 or more"),
        (
            {"hf_overrides": {"vision_features": "new"}},
            r"vision_features='new' .*; allowed: reference, transformers",
        ),
        ({"hf_overrides": {"pre_image_rows": 1}}, r"pre_image_rows=1 .*; allowed: transformers, reference"),
        ({"pipeline_parallel_size": 2}, "[Pp]ipeline parallelism is not supported"),
    ],
)
def test_settings_that_cannot_be_are_refused(checkpoint: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, NotImplementedError), match=message):
        engine_config(checkpoint, **options)
