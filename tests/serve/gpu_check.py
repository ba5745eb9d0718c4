"""See scripts/gpu-check. Prints one JSON object per part; exit code 1 where parity fails."""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import conftest
import torch

REAL = {
    "image_size": 560,
    "vision": {
        "hidden_size": 1280,
        "attention_heads": 16,
        "intermediate_size": 5120,
        "vision_output_dim": 1280 * 4,
    },
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
}
"""The 11B's widths; the depths are the tests' own: 6 text layers, 4 local and 2 global vision layers."""


def parity(folder: Path, device: str, config: dict[str, Any]) -> dict[str, Any]:
    """Differences of the served bfloat16 log probabilities from a float32 oracle, and how far bfloat16 alone is."""
    from cases import draw_cases
    from checkpoints import make_adapter, make_checkpoint
    from oracle import Oracle
    from served import Engine, compare

    base = make_checkpoint(folder / "base", **config)
    names = ("everything", "vision-1", "vision-2", "cross-kv-1", "cross-kv-2")
    adapters = {
        name: make_adapter(base, folder / name, i, **conftest.ADAPTERS[name]) for i, name in enumerate(names)
    }
    lora = {"enable_lora": True, "max_loras": 3, "max_lora_rank": 16}
    engine = Engine(
        base, adapters, **{**conftest.LIMITS, **lora, "dtype": "bfloat16", "gpu_memory_utilization": 0.4}
    )
    cases = draw_cases(0, 60, [None, *names], tile=config.get("image_size", 28))
    outputs = engine.generate(cases)
    exact, rounded = (Oracle(base, adapters, device=device, dtype=d) for d in (torch.float32, torch.bfloat16))
    served, own = [], []
    for case, output in zip(cases, outputs, strict=True):
        ids = output.outputs[0].token_ids
        served.append(compare(exact, case, output)[1])
        difference = exact.logprobs(case, ids) - rounded.logprobs(case, ids)
        own.append(difference.gather(1, torch.tensor(ids)[:, None]).abs().max().item())
    mean, noise = sum(served) / len(served), sum(own) / len(own)
    return {
        "part": "parity",
        "cases": len(cases),
        "mean": mean,
        "bfloat16 alone": noise,
        "ok": mean < 2 * noise,
    }


def throughput(folder: Path, tiny: bool) -> dict[str, Any]:
    """Output tokens/s of the 11B with random weights, 32 requests with one four-tile image each."""
    from checkpoints import CHAT_TEMPLATE, make_config, make_tokenizer
    from PIL import Image
    from transformers import MllamaConfig, MllamaImageProcessorPil, MllamaProcessor
    from vllm import LLM, SamplingParams

    tokenizer = make_tokenizer()
    config = make_config(tokenizer) if tiny else MllamaConfig(vision_config={"image_size": 560})
    config.architectures = ["MllamaForConditionalGeneration"]
    config.save_pretrained(folder)
    size = config.vision_config.image_size
    images = MllamaImageProcessorPil(size={"height": size, "width": size}, max_image_tiles=4)
    MllamaProcessor(images, tokenizer, chat_template=CHAT_TEMPLATE).save_pretrained(folder)
    llm = LLM(
        str(folder),
        load_format="dummy",
        dtype="bfloat16",
        max_model_len=1024,
        limit_mm_per_prompt={"image": 1},
    )
    prompt = {
        "prompt_token_ids": [1, config.image_token_index, *range(2, 40)],
        "multi_modal_data": {"image": Image.new("RGB", (2 * size, 2 * size))},
    }
    params = SamplingParams(temperature=0, max_tokens=8 if tiny else 128, ignore_eos=True, detokenize=False)
    llm.generate([prompt], params, use_tqdm=False)
    start = time.perf_counter()
    outputs = llm.generate([prompt] * 32, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    return {"part": "throughput", "requests": 32, "tokens/s": tokens / seconds, "ok": True}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true", help="Tiny shapes, any machine: a rehearsal.")
    parser.add_argument("--part", choices=["parity", "throughput"], help="One part in this process.")
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        print("gpu-check: no CUDA device; rehearse with --tiny", file=sys.stderr)
        return 2
    if options.part is None:  # an engine per process
        flags = [sys.executable, __file__, *(["--tiny"] if options.tiny else [])]
        return max(
            os.spawnv(os.P_WAIT, flags[0], [*flags, "--part", part]) for part in ("parity", "throughput")
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        if options.part == "parity":
            result = parity(Path(folder), device, {} if options.tiny else REAL)
        else:
            result = throughput(Path(folder), options.tiny)
    print(json.dumps(result), flush=True)
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
