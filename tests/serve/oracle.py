"""What transformers and PEFT say about a request, in float32: the oracle for the served model."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import peft
import torch
from cases import Case
from transformers import AutoProcessor, MllamaForConditionalGeneration
from transformers.models.mllama.modeling_mllama import MllamaCrossAttentionDecoderLayer

from lvnas.bases.vision_features import set_vision_features


class Oracle:
    """A checkpoint and its adapters, run by transformers with eager attention."""

    def __init__(
        self,
        base: Path,
        adapters: Mapping[str, Path],
        features: str = "reference",
        pre_image_rows: str = "transformers",
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        model = MllamaForConditionalGeneration.from_pretrained(base, attn_implementation="eager", dtype=dtype)
        self.model = set_vision_features(model.eval().to(device), features)
        if pre_image_rows == "reference":
            mask_attention_too(self.model)
        self.processor = AutoProcessor.from_pretrained(base)
        for name, folder in adapters.items():
            if isinstance(self.model, peft.PeftModel):
                self.model.load_adapter(folder, name, autocast_adapter_dtype=False)
            else:
                self.model = peft.PeftModel.from_pretrained(
                    self.model, folder, name, autocast_adapter_dtype=False
                )

    def prompt_ids(self, case: Case) -> list[int]:
        return self.processor.tokenizer(case.text, add_special_tokens=False).input_ids

    @torch.no_grad()
    def logprobs(self, case: Case, generated: Sequence[int]) -> torch.Tensor:
        """Log probabilities [len(generated), vocabulary] of each generated token's place."""
        prompt = self.prompt_ids(case)
        inputs = {"input_ids": torch.tensor([[*prompt, *generated]])}
        model = self._adapted(case.adapter)
        if case.images:
            images = self.processor(
                images=[case.images], text=[case.text], add_special_tokens=False, return_tensors="pt"
            )
            assert images.input_ids[0].tolist() == prompt
            mask = images.cross_attention_mask
            grown = mask[:, -1:].expand(-1, len(generated), -1, -1)
            inputs["cross_attention_mask"] = torch.cat([mask, grown], dim=1)
            for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"):
                inputs[name] = images[name]
        logits = model(**{name: value.to(model.device) for name, value in inputs.items()}).logits[0]
        return logits[len(prompt) - 1 : -1].float().log_softmax(-1).cpu()

    def _adapted(self, adapter: str | None) -> torch.nn.Module:
        if not isinstance(self.model, peft.PeftModel):
            return self.model
        if adapter is None:
            self.model.base_model.disable_adapter_layers()
        else:
            self.model.base_model.enable_adapter_layers()
            self.model.set_adapter(adapter)
        return self.model


def mask_attention_too(model: torch.nn.Module) -> None:
    """Meta's treatment of rows before the first image: their cross-attention is zeroed, as their MLP is."""
    for layer in model.modules():
        if isinstance(layer, MllamaCrossAttentionDecoderLayer):
            layer.register_forward_pre_hook(_remember_mask, with_kwargs=True)
            layer.cross_attn.register_forward_hook(lambda _, __, out, layer=layer: _masked(layer, out))


def _remember_mask(layer: torch.nn.Module, args: tuple, kwargs: dict) -> None:
    layer.rows = kwargs["full_text_row_masked_out_mask"]


def _masked(layer: torch.nn.Module, output: tuple) -> tuple:
    return (output[0] if layer.rows is None else output[0] * layer.rows[:, 0], *output[1:])
