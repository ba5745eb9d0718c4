"""Random tiny Llama and Qwen2-VL checkpoints, PEFT adapters of mixed ranks on them, and PEFT's own answers."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import peft
import torch
import transformers
from checkpoints import make_tokenizer, randomise
from transformers import Qwen2VLImageProcessorPil

from lvnas_vllm.ragged import SWITCH

VOCABULARY = 264
HERE = Path(__file__).parent


def run_job(folder: Path, ragged: bool, steps: list, adapters: dict, environment=None, **engine):
    """The results of `steps` on an engine in a new process, and what it logged."""
    folder.mkdir(parents=True, exist_ok=True)
    job = {"engine": engine, "adapters": {k: str(v) for k, v in adapters.items()}, "steps": steps}
    (folder / "job.json").write_text(json.dumps(job))
    settings = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "TORCHDYNAMO_DISABLE": "1",
        SWITCH: str(int(ragged)),
        "VLLM_LOGGING_LEVEL": "INFO",
    }
    command = [
        sys.executable,
        str(HERE / "ragged_job.py"),
        str(folder / "job.json"),
        str(folder / "result.json"),
    ]
    done = subprocess.run(
        command,
        env={**os.environ, **settings, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "result.json").read_text()), done.stdout + done.stderr


def llama(folder: Path) -> Path:
    config = transformers.LlamaConfig(
        hidden_size=128,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=256,
    )
    model = transformers.LlamaForCausalLM(config).float()
    randomise(model, 0)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def phi3(folder: Path) -> Path:
    """One projection for q, k and v and one for gate and up, in the checkpoint and in its adapters."""
    config = transformers.Phi3Config(
        hidden_size=128,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = transformers.Phi3ForCausalLM(config).float()
    randomise(model, 0)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


QWEN_IMAGES = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=28 * 28 * 16)


def qwen2_vl(folder: Path) -> Path:
    """With image and video processors by name only: making them needs torchvision, here only vLLM has it."""
    tokenizer = make_tokenizer()
    marks = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
    tokenizer.add_special_tokens({"additional_special_tokens": list(marks)})
    ids = dict(zip(marks, tokenizer.convert_tokens_to_ids(list(marks)), strict=True))
    config = transformers.Qwen2VLConfig(
        bos_token_id=None,
        eos_token_id=None,
        text_config={
            "bos_token_id": None,
            "eos_token_id": None,
            "hidden_size": 128,
            "intermediate_size": 160,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 512,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
        },
        vision_config={"depth": 2, "embed_dim": 64, "hidden_size": 128, "num_heads": 2, "mlp_ratio": 2},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        vocab_size=len(tokenizer),
    )
    model = transformers.Qwen2VLForConditionalGeneration(config).float()
    randomise(model, 0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = QWEN_IMAGES.to_dict()
    for kind, file in (("Image", "preprocessor_config.json"), ("Video", "video_preprocessor_config.json")):
        named = {**settings, f"{kind.lower()}_processor_type": f"Qwen2VL{kind}Processor"}
        (folder / file).write_text(json.dumps(named))
    return folder


def adapter(
    base: Path, folder: Path, seed: int, ranks=(1, 3, 4, 8, 16), share=0.8, also=(), scale=0.15
) -> Path:
    """A random PEFT adapter: about `share` of the linear layers, each at a rank drawn from `ranks`."""
    model = (
        transformers.AutoModelForImageTextToText if "vl" in base.name else transformers.AutoModelForCausalLM
    )
    model = model.from_pretrained(base)
    draw = random.Random(seed)
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name and draw.random() < share
    ]
    names += also
    pattern = {f"^{name.replace('.', chr(92) + '.')}$": draw.choice(ranks) for name in names}
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=names, rank_pattern=pattern, alpha_pattern={
        key: scale * 4 * draw.choice((1, 2)) for key in pattern
    })  # fmt: skip
    adapted = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(adapted.named_parameters()):
            if "lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator))
    adapted.save_pretrained(folder)
    return folder


class Peft:
    """The base with all adapters in transformers and PEFT, in float32."""

    def __init__(self, base: Path, adapters: dict[str, Path]) -> None:
        auto = (
            transformers.AutoModelForImageTextToText
            if "vl" in base.name
            else transformers.AutoModelForCausalLM
        )
        (first, folder), *others = adapters.items()
        self.model = peft.PeftModel.from_pretrained(auto.from_pretrained(base).float().eval(), folder, first)
        for name, folder in others:
            self.model.load_adapter(folder, name)

    @torch.no_grad()
    def greedy(self, prompt: list[int], name: str | None, answer: list[int], **images) -> list[int]:
        """The greedy choice at each place of `answer`, given the tokens before it."""
        inputs = {"input_ids": torch.tensor([[*prompt, *answer]]), **images}
        if name is None:
            with self.model.disable_adapter():
                logits = self.model(**inputs).logits[0]
        else:
            self.model.set_adapter(name)
            logits = self.model(**inputs).logits[0]
        return logits[len(prompt) - 1 : -1].argmax(-1).tolist()
