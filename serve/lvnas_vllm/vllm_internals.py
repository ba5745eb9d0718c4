"""Every touch of a name that vLLM does not promise to keep; test_vllm_internals.py guards each."""

from collections.abc import Iterator

import torch

ARCHITECTURE = "MllamaForConditionalGeneration"


def register_mllama() -> None:
    """Adds the model, its config class and its engine hook to vLLM's registries."""
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    from lvnas_vllm.mllama_config import MllamaEngineConfig, MllamaServingConfig

    _CONFIG_REGISTRY["mllama"] = MllamaServingConfig
    MODELS_CONFIG_MAP[ARCHITECTURE] = MllamaEngineConfig
    ModelRegistry.register_model(ARCHITECTURE, f"lvnas_vllm.mllama:{ARCHITECTURE}")


def fix_encoder_order() -> None:
    """Encodes images in batch order.

    The V1 runner encodes in the scheduler's order, while cross-attention fills the cache in batch order. They
    differ when one step resumes a preempted request and starts a new one: requests then see each other's
    images.
    """
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    original = GPUModelRunner._batch_mm_inputs_from_scheduler
    if getattr(original, "in_batch_order", False):
        return

    def _batch_mm_inputs_from_scheduler(self, scheduler_output):  # type: ignore[no-untyped-def]
        if self.model_config.is_encoder_decoder:
            index = self.input_batch.req_id_to_index
            inputs = scheduler_output.scheduled_encoder_inputs
            scheduler_output.scheduled_encoder_inputs = dict(
                sorted(inputs.items(), key=lambda x: index[x[0]])
            )
        return original(self, scheduler_output)

    _batch_mm_inputs_from_scheduler.in_batch_order = True  # type: ignore[attr-defined]
    GPUModelRunner._batch_mm_inputs_from_scheduler = _batch_mm_inputs_from_scheduler


def fix_cpu_lora() -> None:
    """Replaces the CPU LoRA operators by ones that leave rows without an adapter alone.

    vLLM's take index -1, "no adapter", as the last adapter slot (vLLM pull requests 48421 and 49656), and
    gather one copy of the weights per token: 2 GB of temporaries for one real-size image at rank 16.
    """
    from vllm.lora.ops import torch_ops
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    for function in (bgmv_shrink, bgmv_expand, bgmv_expand_slice):
        for module in (lora_ops, torch_ops, punica_cpu):
            setattr(module, function.__name__, function)


def _by_adapter(
    inputs: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor, dtype: torch.dtype
) -> Iterator[tuple[torch.Tensor | slice, torch.Tensor]]:
    """Per adapter in use: its rows, and their products with its weights [slots, 1, outputs, inputs]."""
    assert len(indices) == len(inputs), f"LoRA mapping of {len(indices)} tokens for {len(inputs)} tokens"
    weights = weights.squeeze(1) if weights.dim() == 4 else weights
    adapters = indices.unique().tolist()
    for adapter in adapters:
        if adapter < 0:
            continue
        rows = slice(None) if len(adapters) == 1 else (indices == adapter).nonzero().squeeze(1)
        yield rows, inputs[rows].to(dtype) @ weights[adapter].to(dtype).T


def bgmv_shrink(
    inputs: torch.Tensor,
    lora_b_weights: torch.Tensor,
    output_tensor: torch.Tensor,
    lora_indices_tensor: torch.Tensor,
    scaling: float = 1.0,
) -> None:
    """Writes `scaling * inputs @ A[index].T` to the first columns of each row with an adapter."""
    for rows, out in _by_adapter(inputs, lora_b_weights, lora_indices_tensor, output_tensor.dtype):
        output_tensor[rows, : out.shape[1]] = scaling * out


def bgmv_expand(
    inputs: torch.Tensor,
    lora_b_weights: torch.Tensor,
    output_tensor: torch.Tensor,
    lora_indices_tensor: torch.Tensor,
    add_inputs: bool = True,
) -> None:
    """Adds (or writes) `inputs @ B[index].T` to the first columns of each row with an adapter."""
    width = min(lora_b_weights.shape[-2], output_tensor.shape[1])
    bgmv_expand_slice(inputs, lora_b_weights, output_tensor, lora_indices_tensor, 0, width, add_inputs)


def bgmv_expand_slice(
    inputs: torch.Tensor,
    lora_b_weights: torch.Tensor,
    output_tensor: torch.Tensor,
    lora_indices_tensor: torch.Tensor,
    slice_offset: int,
    slice_size: int,
    add_inputs: bool = True,
) -> None:
    """Adds (or writes) `inputs @ B[index].T` to columns `slice_offset:slice_offset + slice_size`."""
    output = output_tensor[:, slice_offset : slice_offset + slice_size]
    for rows, out in _by_adapter(inputs, lora_b_weights, lora_indices_tensor, output_tensor.dtype):
        if add_inputs:
            output[rows] += out[:, :slice_size]
        else:
            output[rows] = out[:, :slice_size]


def reject_stray_images() -> None:
    """Refuses a literal image token in a prompt without images, as transformers' processor does.

    Such prompts do not pass the multimodal processor, and the embedding's extra rows would serve the token.
    """
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.input_processor import InputProcessor

    original = InputProcessor._validate_model_inputs
    if getattr(original, "rejects_stray_images", False):
        return

    def _validate_model_inputs(self, encoder_input, decoder_input):  # type: ignore[no-untyped-def]
        config = self.model_config.hf_config
        tokens = decoder_input.get("prompt_token_ids") or ()
        text_only = config.model_type == "mllama" and decoder_input["type"] == "token"
        if text_only and config.image_token_index in tokens:
            raise VLLMValidationError("The prompt has an image token but no image.", parameter="image")
        return original(self, encoder_input, decoder_input)

    _validate_model_inputs.rejects_stray_images = True  # type: ignore[attr-defined]
    InputProcessor._validate_model_inputs = _validate_model_inputs
