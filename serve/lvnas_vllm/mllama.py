"""Llama-3.2-Vision (MllamaForConditionalGeneration) for vLLM V1: an encoder-decoder, LoRA everywhere.

The images of a request are its encoder input: all of them are one multimodal item. They are encoded in the
step that prefills the request, and the cross-attention keys and values that decoding needs then live in the
cache. Module names are those of transformers >= 5, so PEFT adapters fit without renaming.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import ColumnParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.interfaces import SupportsLoRA, SupportsMultiModal
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY

from lvnas_vllm.mllama_config import image_tokens, padded_patches, patches_per_tile
from lvnas_vllm.mllama_processor import (
    COUNTS,
    FIELDS,
    MllamaDummyInputs,
    MllamaMultiModalProcessor,
    MllamaProcessingInfo,
)
from lvnas_vllm.mllama_text import CrossPlan, MllamaTextModel
from lvnas_vllm.mllama_visibility import kept_tokens, segments
from lvnas_vllm.mllama_vision import MllamaVisionModel
from lvnas_vllm.vllm_internals.lora import check_lora_tokens


class MllamaModel(nn.Module):
    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config, quant = vllm_config.model_config.hf_config, vllm_config.quant_config
        self.vision_model = MllamaVisionModel(config, quant, f"{prefix}.vision_model")
        self.multi_modal_projector = ColumnParallelLinear(
            config.vision_config.vision_output_dim,
            config.text_config.hidden_size,
            gather_output=True,
            quant_config=quant,
            prefix=f"{prefix}.multi_modal_projector",
        )
        self.language_model = MllamaTextModel(config.text_config, vllm_config, f"{prefix}.language_model")


@MULTIMODAL_REGISTRY.register_processor(
    MllamaMultiModalProcessor, info=MllamaProcessingInfo, dummy_inputs=MllamaDummyInputs
)
class MllamaForConditionalGeneration(nn.Module, SupportsMultiModal, SupportsLoRA):
    supports_tower_connector_lora = True
    packed_modules_mapping = {  # noqa: RUF012
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "kv_proj": ["k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    # The prefixes take the Hub's layout (written by transformers < 4.50) to that of transformers >= 5.
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={
            "vision_model.": "model.vision_model.",
            "multi_modal_projector.": "model.multi_modal_projector.",
            "language_model.model.": "model.language_model.",
            "language_model.lm_head.": "lm_head.",
        },
        orig_to_new_stacked={
            ".self_attn.q_proj": (".self_attn.qkv_proj", "q"),
            ".self_attn.k_proj": (".self_attn.qkv_proj", "k"),
            ".self_attn.v_proj": (".self_attn.qkv_proj", "v"),
            ".cross_attn.k_proj": (".cross_attn.kv_proj", 0),
            ".cross_attn.v_proj": (".cross_attn.kv_proj", 1),
            ".gate_proj": (".gate_up_proj", 0),
            ".up_proj": (".gate_up_proj", 1),
        },
    )

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        if modality == "image":
            return "<|image|>"
        raise ValueError(f"modality {modality!r} is not supported; allowed: image")

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config = vllm_config.model_config.hf_config
        text = self.config.text_config
        self.tile_tokens = patches_per_tile(self.config)
        self.image_tokens = image_tokens(self.config)
        self.cross_layers = list(text.cross_attention_layers)
        with self._mark_composite_model(
            vllm_config, language_targets=MllamaTextModel, tower_targets={"image": MllamaVisionModel}
        ):
            self.model = MllamaModel(vllm_config, maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(
            text.vocab_size,
            text.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        self.logits_processor = LogitsProcessor(text.vocab_size)

    def get_mm_mapping(self) -> MultiModelKeys:
        """Which token count a LoRA layer runs on: keys and values of cross-attention run on image tokens."""
        layers = "model.language_model.layers"
        return MultiModelKeys.from_string_field(
            language_model="model.language_model",
            connector=[
                *(f"{layers}.{i}.cross_attn.kv_proj" for i in self.cross_layers),
                "model.multi_modal_projector",
            ],
            tower_model="model.vision_model",
        )

    def get_mm_lora_token_counts(
        self, *, modality: str, mm_kwargs: Mapping[str, Any] | None, num_mm_embeds: int
    ) -> tuple[int, int]:
        """Tokens (in the vision model, after it) of one item; without an item, the most a budget admits."""
        if mm_kwargs is not None:
            images = mm_kwargs["aspect_ratio_ids"].data.numel()
        else:
            images = num_mm_embeds // self.image_tokens  # see MllamaEncoderBudget
        tiles = images * self.config.vision_config.max_num_tiles
        return tiles * padded_patches(self.config), tiles * self.tile_tokens

    @classmethod
    def get_model_state_cls(cls) -> type:
        """Model Runner V2's hook."""
        from lvnas_vllm.mllama_state import MllamaModelState

        return MllamaModelState

    def embed_multimodal(self, **kwargs: Any) -> list[torch.Tensor]:
        """The projected tokens of each item: [images * tiles * patches, hidden], padding tiles included.

        Each tensor carries `tiles`, the number of real tiles of each of its images, as an attribute, so that
        the two stay together in whatever order a runner hands the tensors to `forward`.
        """
        pixels, ratios, masks, tokens = (list(kwargs[name]) for name in (*FIELDS, COUNTS))
        images = [len(item) for item in ratios]
        vision = self.model.vision_model
        check_lora_tokens(
            vision.transformer.layers[0].mlp.fc1, sum(images) * vision.tile_count * vision.padded
        )
        features = vision(torch.cat(pixels), torch.cat(ratios), torch.cat(masks))
        projected, _ = self.model.multi_modal_projector(features.flatten(0, 2))
        items = list(projected.split([count * self.image_tokens for count in images]))
        for item, counts in zip(items, tokens, strict=True):
            item.tiles = [count // self.tile_tokens for count in counts.tolist()]
        return items

    def embed_input_ids(self, input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return self.model.language_model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: None = None,
        inputs_embeds: None = None,
        encoder_outputs: Sequence[torch.Tensor] = (),
        encoder_order: Sequence[int] | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """Hidden states [T, D] of a batch.

        Args:
            encoder_outputs: what `embed_multimodal` gave for the requests that start in this step.
            encoder_order: for each of these requests in batch order, which of `encoder_outputs` is its own;
                None where they are in batch order.
        """
        plan = self._plan(input_ids, positions, encoder_outputs, encoder_order)
        return self.model.language_model(input_ids, positions, plan)

    def _plan(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        outputs: Sequence[torch.Tensor],
        order: Sequence[int] | None,
    ) -> CrossPlan | None:
        metadata = get_forward_context().attn_metadata
        if metadata is None:  # memory profiling: every layer runs
            return CrossPlan()
        layer = self.model.language_model.layers[self.cross_layers[0]].cross_attn.attn.layer_name
        metadata = metadata[layer]
        if metadata.max_seq_len == 0:
            return None
        starts, cached = metadata.query_start_loc, metadata.seq_lens
        request = torch.searchsorted(
            starts[1:], torch.arange(len(input_ids), device=starts.device, dtype=starts.dtype), right=True
        )
        image_rows = (cached > 0)[request.clamp(max=len(cached) - 1)][:, None]
        if not outputs:
            return CrossPlan(image_rows)
        return self._prefill_plan(
            input_ids, positions, outputs, order, starts.tolist(), cached.tolist(), image_rows
        )

    def _prefill_plan(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        outputs: Sequence[torch.Tensor],
        order: Sequence[int] | None,
        starts: list[int],
        cached: list[int],
        image_rows: torch.Tensor,
    ) -> CrossPlan:
        """The plan of a step in which requests with images start.

        Raises:
            AssertionError: the encoder's outputs do not belong to the requests that start.
        """
        device = input_ids.device
        first = positions[torch.tensor(starts[:-1], device=device).clamp(max=len(positions) - 1)].tolist()
        new = [i for i, kept in enumerate(cached) if kept > 0 and first[i] == 0 and starts[i + 1] > starts[i]]
        order = range(len(outputs)) if order is None else order
        assert len(new) == len(outputs) == len(order), (
            f"{len(outputs)} encoder outputs for {len(new)} new requests with images"
        )
        offsets = [0]
        for output in outputs:
            offsets.append(offsets[-1] + len(output))
        mlp_rows, image_rows = image_rows.clone(), image_rows.clone()
        keep: list[torch.Tensor] = []
        exact: list[tuple[torch.Tensor, torch.Tensor]] = []
        for request, which in zip(new, order, strict=True):
            start, stop = starts[request], starts[request + 1]
            image_at = (input_ids[start:stop] == self.config.image_token_index).nonzero().flatten().tolist()
            tiles, offset = outputs[which].tiles, offsets[which]
            assert len(image_at) == len(tiles), f"{len(image_at)} image tokens for {len(tiles)} images"
            assert cached[request] == kept_tokens(image_at, stop - start, tiles, self.tile_tokens), (
                f"{cached[request]} cached image tokens do not fit images of {tiles} tiles"
            )
            runs = segments(image_at, stop - start)
            keep.append(self._tokens(runs[-1].images, tiles, offset, device))
            for run in runs[:-1]:
                rows = torch.arange(start + run.start, start + run.stop, device=device)
                if run.images:
                    exact.append((rows, self._tokens(run.images, tiles, offset, device)))
                elif self.config.pre_image_rows == "reference":
                    image_rows[rows] = False
                else:
                    mlp_rows[rows] = False
                    everything = torch.arange(offset, offset + len(outputs[which]), device=device)
                    exact.append((rows, everything))
        cross = self.model.language_model.layers[self.cross_layers[0]].cross_attn
        check_lora_tokens(cross.kv_proj, offsets[-1])
        return CrossPlan(image_rows, mlp_rows, torch.cat(list(outputs)), torch.cat(keep), exact)

    def _tokens(
        self, images: Sequence[int], tiles: Sequence[int], offset: int, device: torch.device
    ) -> torch.Tensor:
        """Indices of the real tiles' tokens of `images`, in an item that begins at `offset`."""
        begins = [offset + i * self.image_tokens for i in images]
        return torch.cat(
            [
                torch.arange(begin, begin + tiles[i] * self.tile_tokens, device=device)
                for i, begin in zip(images, begins, strict=True)
            ]
        )

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(self._with_head(weights), mapper=self.hf_to_vllm_mapper)

    def _with_head(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterable[tuple[str, torch.Tensor]]:
        """Adds the output head of checkpoints that tie it to the embedding and leave it out."""
        embedding, seen = None, False
        for name, weight in weights:
            seen |= name.endswith("lm_head.weight")
            if name.endswith("embed_tokens.weight"):
                embedding = weight
            yield name, weight
        configs = (self.config, self.config.text_config)
        tied = any(getattr(config, "tie_word_embeddings", False) for config in configs)
        if not seen and tied and embedding is not None:
            yield "lm_head.weight", embedding[: self.config.text_config.vocab_size]
