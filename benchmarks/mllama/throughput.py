"""Output tokens per second of the served model against transformers' `generate`, same base, same machine, one run.

    python benchmarks/mllama/throughput.py --base tiny --out benchmarks/results/mllama_throughput.json

Both get the same chat prompts with one image each, both decode greedily in the checkpoint's precision, in turns.
"""

import os

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from lvnas import bases, files


def make_images(count: int, side: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(count)]


def with_transformers(
    model: Any, processor: Any, prompt: str, images: list[Image.Image], tokens: int
) -> None:
    inputs = processor(
        images=[[image] for image in images],
        text=[prompt] * len(images),
        add_special_tokens=False,
        return_tensors="pt",
    ).to(model.device, model.dtype)
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    out = model.generate(**inputs, **options, pad_token_id=processor.tokenizer.pad_token_id)
    assert out.shape[1] == inputs.input_ids.shape[1] + tokens


def with_vllm(llm: Any, prompt_ids: list[int], images: list[Image.Image], tokens: int) -> None:
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": prompt_ids, "multi_modal_data": {"image": image}} for image in images]
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert all(len(output.outputs[0].token_ids) == tokens for output in outputs)


def measure(run: Any, images: list[Image.Image], tokens: int) -> float:
    start = time.perf_counter()
    run(images, tokens)
    return len(images) * tokens / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="tiny")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()

    from vllm import LLM

    model, processor = bases.load(options.base)
    dtype = str(model.dtype).removeprefix("torch.")
    most = max(options.batches)
    llm = LLM(bases.resolve(options.base), dtype=dtype, max_model_len=512, max_num_seqs=most, seed=0)
    parts = [{"type": "image"}, {"type": "text", "text": "What is in the picture?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    prompt_ids = processor.tokenizer(prompt, add_special_tokens=False).input_ids
    engines = {
        "transformers": lambda images, tokens: with_transformers(model, processor, prompt, images, tokens),
        "vllm": lambda images, tokens: with_vllm(llm, prompt_ids, images, tokens),
    }
    side = model.config.vision_config.image_size
    rows = []
    for batch in options.batches:
        images = make_images(batch, side)
        speeds: dict[str, list[float]] = {name: [] for name in engines}
        for run in engines.values():
            run(images, options.tokens)
        for _ in range(options.rounds):
            for name, run in engines.items():
                speeds[name].append(measure(run, images, options.tokens))
        middle = {name: statistics.median(values) for name, values in speeds.items()}
        rows.append(
            {"batch": batch, "ratio": middle["vllm"] / middle["transformers"], **middle, "all": speeds}
        )
        print(f"batch {batch}: {middle}, ratio {rows[-1]['ratio']:.2f}", flush=True)
    files.write_json(
        options.out,
        {
            "unit": "output tokens/s",
            "rows": rows,
            **files.provenance(
                base=options.base,
                dtype=dtype,
                tokens=options.tokens,
                rounds=options.rounds,
                threads=torch.get_num_threads(),
                load_average=os.getloadavg(),
            ),
        },
    )


if __name__ == "__main__":
    main()
