"""The language model of Llama-3.2-Vision: Llama layers with gated cross-attention layers in between.

Shapes: T decoder tokens of the whole batch, N image tokens of the requests that start in this step, D hidden
size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.mllama.configuration_mllama import MllamaTextConfig
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import CrossAttention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaMLP

EXTRA_EMBEDDINGS = 8
"""Rows of the embedding beyond the vocabulary: the image token and room beside it."""


@dataclass
class CrossPlan:
    """What the cross-attention layers do in one step.

    image_rows: [T, 1] rows the layers apply to; other rows pass unchanged. None: all rows.
    mlp_rows: [T, 1] rows whose MLP applies. None: all of `image_rows`.
    states: [N, D] projected image tokens of the requests that start now; None where none does.
    cached: [C] which of the N tokens go into the cross-attention cache, in batch order.
    exact: (rows, tokens) pairs, index tensors into T and N: rows that do not see exactly their request's
        cached tokens, and what they see instead.
    """

    image_rows: torch.Tensor | None = None
    mlp_rows: torch.Tensor | None = None
    states: torch.Tensor | None = None
    cached: torch.Tensor | None = None
    exact: Sequence[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)


class MllamaCrossAttention(nn.Module):
    """Attention of text rows to image tokens, with RMS norms on queries and keys and no positions."""

    def __init__(self, config: MllamaTextConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        parallel = get_tensor_model_parallel_world_size()
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        if kv_heads % parallel:
            raise ValueError(f"tensor parallel size {parallel} must divide the {kv_heads} key-value heads")
        self.head_dim = config.hidden_size // heads
        self.heads, self.kv_heads = heads // parallel, kv_heads // parallel
        quant = vllm_config.quant_config
        self.q_proj = ColumnParallelLinear(
            config.hidden_size,
            heads * self.head_dim,
            bias=False,
            quant_config=quant,
            prefix=f"{prefix}.q_proj",
        )
        self.kv_proj = MergedColumnParallelLinear(
            config.hidden_size,
            [kv_heads * self.head_dim] * 2,
            bias=False,
            quant_config=quant,
            prefix=f"{prefix}.kv_proj",
        )
        self.o_proj = RowParallelLinear(
            heads * self.head_dim,
            config.hidden_size,
            bias=False,
            quant_config=quant,
            prefix=f"{prefix}.o_proj",
        )
        self.q_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.attn = CrossAttention(
            self.heads,
            self.head_dim,
            self.head_dim**-0.5,
            num_kv_heads=self.kv_heads,
            cache_config=vllm_config.cache_config,
            quant_config=quant,
            prefix=f"{prefix}.attn",
        )

    def forward(self, hidden_TD: torch.Tensor, plan: CrossPlan) -> torch.Tensor:
        q, _ = self.q_proj(hidden_TD)
        q = self.q_norm(q.view(-1, self.heads, self.head_dim))
        if plan.states is None:
            out = self.attn(q, None, None)
        else:
            kv, _ = self.kv_proj(plan.states)
            k, v = kv.view(-1, 2, self.kv_heads, self.head_dim).unbind(1)
            k, v = self.k_norm(k.contiguous()), v.contiguous()
            out = self.attn(q, k[plan.cached], v[plan.cached])
            for rows, tokens in plan.exact:
                out[rows] = attend(q[rows], k[tokens], v[tokens])
        output, _ = self.o_proj(out.view(hidden_TD.shape[0], -1))
        return output


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Unmasked attention [rows, heads * head dim] of q [rows, heads, dim] to k, v [tokens, kv heads, dim]."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)[0].transpose(0, 1).flatten(1)


class MllamaCrossAttentionLayer(nn.Module):
    """Gated cross-attention and gated MLP; rows of requests without an image skip both."""

    def __init__(self, config: MllamaTextConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.cross_attn = MllamaCrossAttention(config, vllm_config, f"{prefix}.cross_attn")
        self.mlp = LlamaMLP(
            config.hidden_size,
            config.intermediate_size,
            config.hidden_act,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.mlp",
        )
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.cross_attn_attn_gate = nn.Parameter(torch.zeros(1))
        self.cross_attn_mlp_gate = nn.Parameter(torch.zeros(1))

    def forward(self, hidden_TD: torch.Tensor, plan: CrossPlan) -> torch.Tensor:
        branch = self.cross_attn(self.input_layernorm(hidden_TD), plan)
        out = hidden_TD + self.cross_attn_attn_gate.tanh() * branch
        branch = self.cross_attn_mlp_gate.tanh() * self.mlp(self.post_attention_layernorm(out))
        if plan.mlp_rows is not None:
            branch = torch.where(plan.mlp_rows, branch, 0)
        out = out + branch
        # `where`, not a product: rows without an image attended to an empty range and may hold NaN.
        return out if plan.image_rows is None else torch.where(plan.image_rows, out, hidden_TD)


class MllamaTextModel(nn.Module):
    def __init__(self, config: MllamaTextConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size + EXTRA_EMBEDDINGS, config.hidden_size)
        self.layers = nn.ModuleList(
            MllamaCrossAttentionLayer(config, vllm_config, f"{prefix}.layers.{i}")
            if i in config.cross_attention_layers
            else LlamaDecoderLayer(vllm_config, f"{prefix}.layers.{i}", config=config)
            for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.embed_tokens(input_ids)

    def forward(
        self, input_ids_T: torch.Tensor, positions_T: torch.Tensor, plan: CrossPlan | None
    ) -> torch.Tensor:
        """Final hidden states [T, D]; without a plan the cross-attention layers are skipped."""
        hidden, residual = self.embed_tokens(input_ids_T), None
        for layer in self.layers:
            if isinstance(layer, LlamaDecoderLayer):
                hidden, residual = layer(positions_T, hidden, residual)
            elif plan is not None:
                hidden, residual = layer(hidden if residual is None else hidden + residual, plan), None
        if residual is None:
            return self.norm(hidden)
        return self.norm(hidden, residual)[0]
