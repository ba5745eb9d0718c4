"""The punica wrapper for CUDA devices: vLLM's token segments, made once per step, with the ragged Triton kernels."""

from typing import Any

import torch
from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU

from lvnas_vllm.ragged.torch_ops import SiteWeights
from lvnas_vllm.ragged.triton_ops import add_ragged_lora


class RaggedWrapperGPU(PunicaWrapperGPU):
    """vLLM's wrapper, whose segments the ragged kernels share."""

    def add_ragged(self, y: torch.Tensor, x: torch.Tensor, weights: SiteWeights) -> None:
        """Adds the LoRA output of every token to y [T, O], in place; x is [T, D]."""
        self._add(y, x, weights, self.token_mapping_meta)

    def add_lora_logits(
        self, y: torch.Tensor, x: torch.Tensor, lora_a_stacked: Any, *args: Any, **kwargs: Any
    ) -> None:
        """The same for logits, whose rows are the sampled tokens; y may be wider than the vocabulary."""
        self._add(y.view(-1, y.shape[-1]), x, lora_a_stacked.ragged.weights, self.prompt_mapping_meta)

    def _add(self, y: torch.Tensor, x: torch.Tensor, weights: SiteWeights, meta: Any) -> None:
        x = x.view(-1, x.shape[-1])
        _, members, counts, starts, active, no_lora, segments = meta.meta_args(
            x.shape[0], self.lora_config.specialize_active_lora
        )
        add_ragged_lora(
            *(y, x, weights.arena, weights.table, weights.device_bounds),
            *(members, counts, starts, active, no_lora, segments),
            *(self.lora_config.max_lora_rank, max(weights.outputs), weights.aligned),
        )
