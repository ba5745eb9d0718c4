"""vLLM's LoRA layers without padded buffers: the weights live in the arena, the operators are ours."""

from typing import Any

import torch
from vllm.lora.layers import ClassificationHeadWithLoRA, LogitsProcessorWithLoRA
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

from lvnas_vllm.ragged.layout import Pair, Site
from lvnas_vllm.ragged.torch_ops import SiteWeights

STACKED = ("lora_a_stacked", "lora_b_stacked")


class RaggedLayer:
    """Mixed in before one of vLLM's LoRA layers; the manager sets `weights` once the arena exists."""

    weights: SiteWeights | None = None

    def create_lora_weights(self: Any, max_loras: int, lora_config: Any, model_config: Any = None) -> None:
        """Makes vLLM's stacked tensors on the meta device: shapes to read, no bytes."""
        device, self.device = self.device, torch.device("meta")
        try:
            super().create_lora_weights(max_loras, lora_config, model_config)  # type: ignore[misc]
        finally:
            self.device = device

    def reset_lora(self, index: int) -> None:
        """Nothing: the manager clears the slot's table rows."""

    def set_lora(self, index: int, lora_a: object, lora_b: object) -> None:
        """Nothing: the manager writes the slot's table rows."""

    def stacked(self: Any) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """vLLM's stacked tensors, one of each per slice."""
        a, b = (getattr(self, name) for name in STACKED)
        return (a, b) if isinstance(a, tuple) else ((a,), (b,))

    def padded_elements(self) -> int:
        """Elements that vLLM's own buffers would take on this device."""
        return sum(tensor.numel() for tensors in self.stacked() for tensor in tensors)

    def site(self, name: str) -> Site:
        """This layer's shapes on this tensor-parallel rank."""
        a, b = self.stacked()
        return Site(name, a[0].shape[-1], tuple(tensor.shape[-2] for tensor in b))

    def pairs(self: Any, lora_a: Any, lora_b: Any) -> list[Pair | None]:
        """An adapter's weights as one pair per slice, cut for this tensor-parallel rank as vLLM does."""
        raise NotImplementedError


class RaggedLinear(RaggedLayer):
    """Linear layers: column, row, merged, QKV and replicated."""

    def pairs(self: Any, lora_a: Any, lora_b: Any) -> list[Pair | None]:
        if isinstance(lora_a, torch.Tensor) and len(self.stacked()[0]) > 1:
            # One checkpoint weight for a layer of several slices: A is shared, B is cut.
            lora_a = [lora_a] * self.n_slices
            lora_b = list(lora_b.split(list(self.base_layer.output_sizes)))
        if isinstance(lora_b, list) and len(lora_b) != self.n_slices:
            lora_a, lora_b = self.expand_packed_lora(lora_a, lora_b)
        if self.tp_size > 1:
            lora_a, lora_b = self.slice_lora_a(lora_a), self.slice_lora_b(lora_b)
        if isinstance(lora_a, torch.Tensor):
            lora_a, lora_b = [lora_a], [lora_b]
        return [None if a is None or b is None else (a, b) for a, b in zip(lora_a, lora_b, strict=True)]

    def _apply_lora_to_output(self: Any, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        shape = output.shape
        if output.ndim == 3:
            output, x = output.flatten(0, 1), x.flatten(0, x.ndim - 2)
        self.punica_wrapper.add_ragged(output, x, self.weights)
        return output.view(shape)


class RaggedLogits(RaggedLayer):
    """The logits of a language model head with LoRA; its rows are the sampled tokens."""

    def create_lora_weights(self: Any, max_loras: int, lora_config: Any, model_config: Any = None) -> None:
        super().create_lora_weights(max_loras, lora_config, model_config)
        # The punica wrapper gets vLLM's tensors and not the layer: it finds the layer through them.
        self.lora_a_stacked.ragged = self
        if self.sharded_to_full_mapping is not None:
            mapping = torch.tensor(self.sharded_to_full_mapping, device=self.device, dtype=torch.long)
            self.sharded_to_full_mapping_gpu = mapping

    def pairs(self, lora_a: Any, lora_b: Any) -> list[Pair | None]:
        return [(lora_a, lora_b)]


def ragged(layer: type) -> type:
    """The ragged form of one of vLLM's LoRA layer classes; one that is not covered comes back as it is.

    Covered: every linear layer that is not fully sharded, and the language model head.
    """
    mixin = RaggedLogits if layer is LogitsProcessorWithLoRA else RaggedLinear
    covered = issubclass(layer, BaseLinearLayerWithLoRA | LogitsProcessorWithLoRA)
    if not covered or "Sharded" in layer.__name__ or layer is ClassificationHeadWithLoRA:
        return layer
    return type(f"Ragged{layer.__name__}", (mixin, layer), {"__doc__": layer.__doc__})
