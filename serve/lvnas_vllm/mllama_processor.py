"""Turns a prompt and its images into what the engine schedules: one multimodal item per request."""

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image
from transformers import BatchFeature
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems, PlaceholderRange
from vllm.multimodal.parse import MultiModalDataItems, MultiModalDataParser, ProcessorBatchItems
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseProcessingInfo,
    EncDecMultiModalProcessor,
    PromptReplacement,
)

from lvnas_vllm.mllama_config import image_tokens, patches_per_tile
from lvnas_vllm.mllama_visibility import kept_tokens

FIELDS = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
COUNTS = "image_tokens"
"""A field of our own beside transformers': the tokens of each image's real tiles."""


class ImageGroup(ProcessorBatchItems[list[Any]]):
    """All images of a request as one item: the scheduler takes one encoder input per request."""

    def __init__(self, groups: Sequence[list[Any]]) -> None:
        super().__init__(groups, "image")

    def get(self, index: int) -> list[Any]:
        return [self._unwrap(image) for image in self.data[index]]

    def get_processor_data(self) -> Mapping[str, object]:
        return {"images": self.get_all()}


class MllamaDataParser(MultiModalDataParser):
    def _parse_image_data(self, data: Any) -> ImageGroup | None:
        if data is None:
            return None
        if isinstance(data, list) and data and all(isinstance(group, list) for group in data):
            return ImageGroup(data)  # what `ImageGroup.get` gave: the cache hands missing items back in
        images = super()._parse_image_data(data)
        if not isinstance(images, ProcessorBatchItems):
            raise VLLMValidationError(
                "image embeddings are not supported; send the images", parameter="image"
            )
        return ImageGroup([list(images.data)]) if len(images) else None


class MllamaProcessingInfo(BaseProcessingInfo):
    @property
    def skip_prompt_length_check(self) -> bool:
        return True  # of the encoder's prompt, which only counts image tokens

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}

    def get_data_parser(self) -> MultiModalDataParser:
        return MllamaDataParser()

    def parse_mm_data(self, mm_data: Mapping[str, Any], *, validate: bool = True) -> MultiModalDataItems:
        """Parses as the base class does, and counts images rather than items."""
        items = super().parse_mm_data(mm_data, validate=validate)
        if validate and "image" in items:
            self.validate_num_items("image", len(items["image"].get(0)))
        return items

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        return {"image": self.allowed_mm_limits["image"] * image_tokens(self.get_hf_config())}


class MllamaDummyInputs(BaseDummyInputsBuilder[MllamaProcessingInfo]):
    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        images = self.info.allowed_mm_limits["image"] if mm_counts.get("image", 0) else 0
        return self.info.get_hf_processor().image_token * images

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """As many images as a request may hold, each of the shape that fills all tiles."""
        if not mm_counts.get("image", 0):
            return {}
        vision = self.info.get_hf_config().vision_config
        rows, columns = max(vision.supported_aspect_ratios, key=lambda ratio: ratio[0] * ratio[1])
        image = Image.new("RGB", (columns * vision.image_size, rows * vision.image_size))
        return {"image": [image] * self.info.allowed_mm_limits["image"]}


class MllamaMultiModalProcessor(EncDecMultiModalProcessor[MllamaProcessingInfo]):
    skip_decoder_start_token = True  # chat templates write the begin-of-text token themselves

    def create_encoder_prompt(self, prompt: list[int], mm_items: MultiModalDataItems) -> list[int]:
        return [0]

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        fields = {name: MultiModalFieldConfig.batched("image") for name in FIELDS}
        return fields | {COUNTS: MultiModalFieldConfig.batched("image", keep_on_cpu=True)}

    def _postprocess_hf_mm_data(
        self,
        mm_inputs: Mapping[str, object],
        hf_processor_mm_kwargs: Mapping[str, object],
        processed_data: BatchFeature,
    ) -> BatchFeature:
        tile_tokens = patches_per_tile(self.info.get_hf_config())
        processed_data[COUNTS] = processed_data["aspect_ratio_mask"].sum(-1) * tile_tokens
        return processed_data

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> list[PromptReplacement]:
        """The encoder's prompt: the number of each image, once for each token of its real tiles.

        `apply` reads the counts from it: it is cached with the item, while the tensors may already be with
        the engine.
        """

        def numbers(item: int) -> list[int]:
            counts = out_mm_kwargs["image"][item][COUNTS].data.tolist()
            return [image for image, count in enumerate(counts) for _ in range(count)]

        return [PromptReplacement(modality="image", target=[0], replacement=numbers)]

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """Processes the images, then reserves in the cache what decoding will attend to."""
        config = self.info.get_hf_config()
        image_at = [i for i, token in enumerate(inputs.prompt) if token == config.image_token_index]
        images = len(inputs.mm_data_items["image"].get(0)) if "image" in inputs.mm_data_items else 0
        if len(image_at) != images:
            raise VLLMValidationError(
                f"The prompt has {len(image_at)} image tokens for {images} images; each needs one.",
                parameter="image",
            )
        result = super().apply(inputs, timing_ctx)
        tile_tokens = patches_per_tile(config)
        numbers = result["encoder_prompt_token_ids"]
        tiles = [numbers.count(image) // tile_tokens for image in range(images)]
        kept = kept_tokens(image_at, len(inputs.prompt), tiles, tile_tokens)
        result["mm_placeholders"] = {"image": [PlaceholderRange(offset=0, length=kept)]}
        return result
