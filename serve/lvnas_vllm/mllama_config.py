"""What the engine must know about Llama-3.2-Vision before it is built."""

import math
from typing import TYPE_CHECKING, Any

from transformers import MllamaConfig
from vllm.logger import init_logger

from lvnas_vllm.mllama_quantization import rename_layers

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

logger = init_logger("vllm.lvnas.mllama")

VISION_FEATURES = ("reference", "transformers")
PRE_IMAGE_ROWS = ("transformers", "reference")
DEFAULT_IMAGES = 4
"""Images a request may hold where `--limit-mm-per-prompt` does not say."""


class MllamaServingConfig(MllamaConfig):
    """transformers' config, told to be an encoder-decoder, with the two switches of the semantics.

    vision_features: which hidden state the intermediate layer i gives, its input ("reference", Meta's code)
        or its output ("transformers", versions 5.x).
    pre_image_rows: what the cross-attention layers do to rows before the first image: attend to everything
        with the MLP masked ("transformers") or nothing at all ("reference", Meta's code).
    """

    def __post_init__(self, **kwargs: Any) -> None:
        self.vision_features = kwargs.pop("vision_features", VISION_FEATURES[0])
        self.pre_image_rows = kwargs.pop("pre_image_rows", PRE_IMAGE_ROWS[0])
        kwargs["is_encoder_decoder"] = True
        super().__post_init__(**kwargs)
        self.is_encoder_decoder = True
        self.max_source_positions = image_tokens(self)


def patches_per_tile(config: MllamaConfig) -> int:
    """Tokens of one tile after the vision model: its patches and the class token."""
    vision = config.vision_config
    return (vision.image_size // vision.patch_size) ** 2 + 1


def padded_patches(config: MllamaConfig) -> int:
    """Tokens of one tile inside the vision transformers, which pad to a multiple of 8."""
    return math.ceil(patches_per_tile(config) / 8) * 8


def image_tokens(config: MllamaConfig) -> int:
    """Tokens of one image, padding tiles included."""
    return config.vision_config.max_num_tiles * patches_per_tile(config)


def check_semantics(config: MllamaConfig) -> None:
    """Raises ValueError where a switch has a value that does not exist."""
    for name, allowed in (("vision_features", VISION_FEATURES), ("pre_image_rows", PRE_IMAGE_ROWS)):
        value = getattr(config, name, allowed[0])
        if value not in allowed:
            raise ValueError(f"{name}={value!r} in the config; allowed: {', '.join(allowed)}")


class MllamaEngineConfig:
    """vLLM's per-architecture hook: what the scheduler, the LoRA manager and the warm-up need."""

    @staticmethod
    def verify_and_update_model_config(model_config: "ModelConfig") -> None:
        from lvnas_vllm.vllm_internals.mllama import check_version

        check_version()
        config = model_config.hf_config
        check_semantics(config)
        if settings := getattr(config, "quantization_config", None):
            config.quantization_config = rename_layers(settings)

    @staticmethod
    def verify_and_update_config(vllm_config: "VllmConfig") -> None:
        _admit_whole_images(vllm_config)
        _run_eagerly(vllm_config)
        if vllm_config.cache_config.enable_prefix_caching:
            logger.info("prefix caching switched off: vLLM has none for encoder-decoder models")
            vllm_config.cache_config.enable_prefix_caching = False
        lora = vllm_config.lora_config
        if lora is not None and not lora.enable_tower_connector_lora:
            # Cross-attention keys and values run on image tokens: they need the connector's token mapping.
            logger.info("enable_tower_connector_lora switched on: this model's LoRA needs it")
            lora.enable_tower_connector_lora = True


def _admit_whole_images(vllm_config: "VllmConfig") -> None:
    """Raises the scheduler's limits to the tokens of a request's images, which are encoded in one step.

    Raises:
        ValueError: no images allowed, which vLLM's scheduler does not take from an encoder-decoder.
    """
    config = vllm_config.model_config.hf_config
    limits = vllm_config.model_config.multimodal_config.limit_per_prompt
    if "image" not in limits:
        from vllm.config.multimodal import ImageDummyOptions

        limits["image"] = ImageDummyOptions(count=DEFAULT_IMAGES)
    images = limits["image"].count
    if images < 1:
        raise ValueError(
            f"limit_mm_per_prompt image={images}; allowed: 1 or more (requests without an image cost none)"
        )
    tokens = images * image_tokens(config)
    config.max_source_positions = tokens
    scheduler = vllm_config.scheduler_config
    for limit in ("max_num_batched_tokens", "max_num_encoder_input_tokens", "encoder_cache_size"):
        if getattr(scheduler, limit) < tokens:
            logger.info("%s raised to %d: the images of a request are encoded in one step", limit, tokens)
            setattr(scheduler, limit, tokens)
    vllm_config.ec_manager_config.encoder_cache_manager_cls = "lvnas_vllm.mllama_budget.MllamaEncoderBudget"


def _run_eagerly(vllm_config: "VllmConfig") -> None:
    """Says that nothing is compiled, before vLLM picks its operators for it."""
    from vllm.config import CompilationMode

    compilation = vllm_config.compilation_config
    if compilation.mode != CompilationMode.NONE and not vllm_config.model_config.enforce_eager:
        # Else vLLM takes operators that only a compiler makes fast.
        logger.info("torch.compile switched off: this model runs eagerly")
        compilation.mode = CompilationMode.NONE
