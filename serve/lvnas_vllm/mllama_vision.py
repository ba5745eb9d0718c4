"""The vision model of Llama-3.2-Vision: two transformers over the tiles of an image, LoRA on every matrix.

Shapes: B images, M tiles per image (padding tiles included), P patches per tile with the class token,
Q = P padded to a multiple of 8, D hidden size, H heads.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import MllamaConfig
from transformers.models.mllama.configuration_mllama import MllamaVisionConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.activation import get_act_fn
from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.quantization import QuantizationConfig

from lvnas_vllm.mllama_config import padded_patches, patches_per_tile


class TileEmbedding(nn.Module):
    """A gated embedding per (aspect ratio, tile), added to all patches of the tile."""

    def __init__(self, config: MllamaVisionConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(
            config.max_aspect_ratio_id + 1, config.max_num_tiles * config.hidden_size
        )
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, hidden_BMPD: torch.Tensor, ratio_B: torch.Tensor) -> torch.Tensor:
        batch, tiles, _, hidden = hidden_BMPD.shape
        return hidden_BMPD + self.embedding(ratio_B).view(batch, tiles, 1, hidden) * self.gate.tanh()


class PositionEmbedding(nn.Module):
    """A position embedding shared by all tiles, mixed by one gate with one per (aspect ratio, tile)."""

    def __init__(self, config: MllamaVisionConfig, patches: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(1))
        self.embedding = nn.Parameter(torch.zeros(patches, config.hidden_size))
        self.tile_embedding = nn.Embedding(
            config.max_aspect_ratio_id + 1, config.max_num_tiles * patches * config.hidden_size
        )

    def forward(self, hidden_BMPD: torch.Tensor, ratio_B: torch.Tensor) -> torch.Tensor:
        hidden_BMPD = hidden_BMPD + (1 - self.gate.tanh()) * self.embedding
        return hidden_BMPD + self.gate.tanh() * self.tile_embedding(ratio_B).view_as(hidden_BMPD)


class VisionAttention(nn.Module):
    def __init__(self, config: MllamaVisionConfig, quant: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        heads = config.attention_heads
        self.heads = heads // get_tensor_model_parallel_world_size()
        self.head_dim = config.hidden_size // heads
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            self.head_dim,
            heads,
            bias=False,
            quant_config=quant,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            heads * self.head_dim,
            config.hidden_size,
            bias=False,
            quant_config=quant,
            prefix=f"{prefix}.o_proj",
        )

    def forward(self, hidden_BTD: torch.Tensor, real_BT: torch.Tensor) -> torch.Tensor:
        """Real tokens attend to all tokens, padding tokens only to real ones: transformers' mask.

        Two unmasked attentions per image say the same as one with a mask of T x T, without that mask.
        """
        batch, tokens, hidden = hidden_BTD.shape
        qkv, _ = self.qkv_proj(hidden_BTD.reshape(batch * tokens, hidden))
        q, k, v = qkv.view(batch, tokens, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        out = torch.empty_like(q)
        for i in range(batch):
            real = real_BT[i].nonzero().squeeze(1)
            padding = (~real_BT[i]).nonzero().squeeze(1)
            out[i, :, real] = F.scaled_dot_product_attention(q[i, :, real], k[i], v[i])
            out[i, :, padding] = F.scaled_dot_product_attention(
                q[i, :, padding], k[i, :, real], v[i, :, real]
            )
        output, _ = self.o_proj(out.transpose(1, 2).reshape(batch * tokens, -1))
        return output.view(batch, tokens, hidden)


class VisionMLP(nn.Module):
    def __init__(self, config: MllamaVisionConfig, quant: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        self.activation = get_act_fn(config.hidden_act)
        self.fc1 = ColumnParallelLinear(
            config.hidden_size, config.intermediate_size, quant_config=quant, prefix=f"{prefix}.fc1"
        )
        self.fc2 = RowParallelLinear(
            config.intermediate_size, config.hidden_size, quant_config=quant, prefix=f"{prefix}.fc2"
        )

    def forward(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        hidden, _ = self.fc1(hidden_BTD.reshape(-1, hidden_BTD.shape[-1]))
        hidden, _ = self.fc2(self.activation(hidden))
        return hidden.view_as(hidden_BTD)


class VisionLayer(nn.Module):
    """Pre-norm transformer layer; in the global transformer both branches are gated."""

    def __init__(
        self, config: MllamaVisionConfig, gated: bool, quant: QuantizationConfig | None, prefix: str
    ) -> None:
        super().__init__()
        self.self_attn = VisionAttention(config, quant, f"{prefix}.self_attn")
        self.mlp = VisionMLP(config, quant, f"{prefix}.mlp")
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.gated = gated
        if gated:
            self.gate_attn = nn.Parameter(torch.zeros(1))
            self.gate_ffn = nn.Parameter(torch.zeros(1))

    def forward(self, hidden_BTD: torch.Tensor, real_BT: torch.Tensor) -> torch.Tensor:
        branch = self.self_attn(self.input_layernorm(hidden_BTD), real_BT)
        hidden_BTD = hidden_BTD + (self.gate_attn.tanh() * branch if self.gated else branch)
        branch = self.mlp(self.post_attention_layernorm(hidden_BTD))
        return hidden_BTD + (self.gate_ffn.tanh() * branch if self.gated else branch)


class VisionTransformer(nn.Module):
    def __init__(
        self,
        config: MllamaVisionConfig,
        layers: int,
        gated: bool,
        quant: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            VisionLayer(config, gated, quant, f"{prefix}.layers.{i}") for i in range(layers)
        )

    def forward(self, hidden_BTD: torch.Tensor, real_BT: torch.Tensor) -> list[torch.Tensor]:
        """The input of every layer, then the output of the last."""
        states = [hidden_BTD]
        for layer in self.layers:
            states.append(layer(states[-1], real_BT))
        return states


class MllamaVisionModel(nn.Module):
    """Pixels to features: the global transformer's output beside the local one's intermediate states."""

    def __init__(self, config: MllamaConfig, quant: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        vision = config.vision_config
        self.patches, self.padded = patches_per_tile(config), padded_patches(config)
        self.tile_count = vision.max_num_tiles
        # Entry i of the transformer's states is the input of layer i, i + 1 its output.
        offset = 0 if config.vision_features == "reference" else 1
        self.intermediate = [i + offset for i in vision.intermediate_layers_indices]
        self.patch_embedding = nn.Conv2d(
            vision.num_channels, vision.hidden_size, vision.patch_size, vision.patch_size, bias=False
        )
        self.class_embedding = nn.Parameter(torch.zeros(vision.hidden_size))
        self.gated_positional_embedding = PositionEmbedding(vision, self.patches)
        self.pre_tile_positional_embedding = TileEmbedding(vision)
        self.post_tile_positional_embedding = TileEmbedding(vision)
        self.layernorm_pre = nn.LayerNorm(vision.hidden_size)
        self.layernorm_post = nn.LayerNorm(vision.hidden_size)
        self.transformer = VisionTransformer(
            vision, vision.num_hidden_layers, False, quant, f"{prefix}.transformer"
        )
        self.global_transformer = VisionTransformer(
            vision, vision.num_global_layers, True, quant, f"{prefix}.global_transformer"
        )

    def forward(
        self, pixels_BMCHW: torch.Tensor, ratio_B: torch.Tensor, tile_mask_BM: torch.Tensor
    ) -> torch.Tensor:
        """Features [B, M, P, output dim] of images, given their aspect ratio ids and real tiles."""
        batch, tiles = pixels_BMCHW.shape[:2]
        hidden = self.patch_embedding(pixels_BMCHW.flatten(0, 1).to(self.patch_embedding.weight.dtype))
        hidden = hidden.flatten(2).transpose(1, 2).unflatten(0, (batch, tiles))
        hidden = self.pre_tile_positional_embedding(hidden, ratio_B)
        hidden = torch.cat([self.class_embedding.expand(batch, tiles, 1, -1), hidden], dim=2)
        hidden = self.layernorm_pre(self.gated_positional_embedding(hidden, ratio_B))

        padding = self.padded - self.patches
        hidden = F.pad(hidden, (0, 0, 0, padding)).flatten(1, 2)
        real = F.pad(tile_mask_BM.bool()[..., None].expand(-1, -1, self.patches), (0, padding)).flatten(1, 2)

        states = self.transformer(hidden, real)
        hidden = self._by_tile(self.layernorm_post(states[-1]), tiles)
        hidden = self.post_tile_positional_embedding(hidden, ratio_B).flatten(1, 2)
        hidden = self.global_transformer(hidden, real)[-1]
        intermediate = torch.stack([states[i] for i in self.intermediate], dim=-1).flatten(-2)
        return self._by_tile(torch.cat([hidden, intermediate], dim=-1), tiles)[:, :, : self.patches]

    def _by_tile(self, hidden_BTD: torch.Tensor, tiles: int) -> torch.Tensor:
        return hidden_BTD.unflatten(1, (tiles, self.padded))
