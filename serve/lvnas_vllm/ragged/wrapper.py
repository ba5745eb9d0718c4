"""The punica wrapper for CPU: finds the step's runs once, and applies the ragged operators in every layer."""

from typing import Any

import torch
from vllm.logger import init_logger
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from lvnas_vllm.ragged import native
from lvnas_vllm.ragged.runs import LONG, LONG_NATIVE, NO_RUNS, find_runs, token_slots
from lvnas_vllm.ragged.torch_ops import SiteWeights, add_lora

logger = init_logger("vllm.lvnas.ragged")


class RaggedWrapperCPU(PunicaWrapperCPU):
    """vLLM's wrapper, for layers outside the arena, plus the runs of tokens and of sampled tokens."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.runs = self.sampler_runs = NO_RUNS
        self.serves_padded = True
        """Whether any layer uses vLLM's own operators and needs their metadata; the manager knows."""

    def update_metadata(
        self, mapping: Any, lora_index_to_id: list[int | None], *args: Any, **kwargs: Any
    ) -> None:
        if self.serves_padded:
            super().update_metadata(mapping, lora_index_to_id, *args, **kwargs)
        long = LONG if native.load().function is None else LONG_NATIVE
        self.runs = find_runs(token_slots(mapping.index_mapping, lora_index_to_id), long)
        self.sampler_runs = find_runs(token_slots(mapping.prompt_mapping, lora_index_to_id), long)

    def add_ragged(self, y: torch.Tensor, x: torch.Tensor, weights: SiteWeights) -> None:
        """Adds the LoRA output of every token to y [T, O], in place; x is [T, D]."""
        add_lora(y, x, weights, self.runs)

    def add_lora_logits(
        self, y: torch.Tensor, x: torch.Tensor, lora_a_stacked: Any, *args: Any, **kwargs: Any
    ):  # type: ignore[override]
        """The same for logits, whose rows are the sampled tokens; y may be wider than the vocabulary."""
        weights = lora_a_stacked.ragged.weights
        x = x.view(-1, x.shape[-1])
        if not weights.table[..., 2].any():
            return
        if x.shape[0] < self.sampler_runs.tokens:
            # vLLM computes prompt log-probabilities one request at a time and gives no mapping for them.
            logger.warning_once("prompt log-probabilities leave out LoRA on the output head")
            return
        add_lora(y.view(-1, y.shape[-1])[:, : weights.outputs[0]], x, weights, self.sampler_runs)
