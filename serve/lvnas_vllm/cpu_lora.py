"""LoRA operators for the CPU: one matrix product per adapter in use, rows without an adapter untouched."""

from collections.abc import Iterator

import torch


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
