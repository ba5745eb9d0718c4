"""A tiny random Llama-3.2-Vision model for the tests of packing, on disk like any checkpoint."""

from pathlib import Path

import pytest
import torch
from transformers import MllamaConfig, MllamaForConditionalGeneration


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two text layers (one cross-attention), two local and one global vision layer, all weights random."""
    config = MllamaConfig(
        vision_config={
            "hidden_size": 16,
            "attention_heads": 2,
            "intermediate_size": 24,
            "vision_output_dim": 32,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "image_size": 28,
            "patch_size": 14,
            "intermediate_layers_indices": [0],
        },
        text_config={
            "vocab_size": 40,
            "hidden_size": 24,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 36,
            "num_hidden_layers": 2,
            "cross_attention_layers": [1],
            "pad_token_id": 0,
        },
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base") / "tiny-mllama"
    MllamaForConditionalGeneration(config).save_pretrained(folder)
    return folder
