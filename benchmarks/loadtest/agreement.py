"""The same requests to the same server by `lvnas loadtest` and by `vllm bench serve`, in turns; the ratios of both.

    python benchmarks/loadtest/agreement.py URL --tokenizer BASE_FOLDER --models a,b --out FILE

Both send the same texts, the same number of them at once, to the adapters in turn, and want answers of the same
length. A first round warms the server up and does not count.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

from lvnas.files import provenance, write_json
from lvnas_loadtest.plan import Plan
from lvnas_loadtest.prompts import Prompts
from lvnas_loadtest.run import run
from lvnas_loadtest.session import measure_tokens_per_word
from lvnas_loadtest.workload import Workload

FIELDS = ("output_throughput", "request_throughput", "median_ttft_ms", "p99_ttft_ms", "median_tpot_ms",
          "median_e2el_ms", "total_input_tokens", "total_output_tokens", "completed", "duration")  # fmt: skip


def vllm_bench(load: Workload, tokenizer: str, folder: Path) -> dict:
    """One run of `vllm bench serve` with the texts of `load`."""
    import asyncio

    from vllm.benchmarks import serve
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    plan = Plan(load)
    prompts = Prompts(plan)
    prompts.tokens_per_word = measure_tokens_per_word(load)
    texts = [json.loads(prompts.body(planned))["messages"][0]["content"][0]["text"] for planned in plan]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    parser = FlexibleArgumentParser()
    serve.add_cli_args(parser)
    arguments = [
        "--backend", "openai-chat", "--base-url", load.url, "--endpoint", "/v1/chat/completions",
        "--model", tokenizer, "--dataset-name", "custom", "--dataset-path", str(folder / "prompts.jsonl"),
        "--custom-output-len", load.output_tokens, "--skip-chat-template", "--disable-shuffle", "--ignore-eos",
        "--num-prompts", str(load.requests), "--max-concurrency", str(load.users), "--seed", str(load.seed),
        "--lora-modules", *load.adapters, "--lora-assignment", "round-robin", "--ready-check-timeout-sec", "0",
        "--extra-body", '{"temperature": 0.0}', "--percentile-metrics", "ttft,tpot,itl,e2el", "--disable-tqdm",
        "--metric-percentiles", "50,90,99",
    ]  # fmt: skip
    return asyncio.run(serve.main_async(parser.parse_args(arguments)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("url")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--models", required=True)
    parser.add_argument("--users", type=int, default=4)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rounds = []
    with tempfile.TemporaryDirectory() as temporary:
        for number in range(-1, options.rounds):
            load = Workload(
                url=options.url, adapters=options.models.split(","), users=options.users, requests=options.requests,
                popularity="distinct", image_share=0.0, prompt_tokens="48", output_tokens="32", seed=number + 1,
            )  # fmt: skip
            folder = Path(temporary)
            turns = {
                "lvnas": lambda load=load, folder=folder: run(load, folder / "ours"),
                "vllm": lambda load=load, folder=folder: vllm_bench(load, options.tokenizer, folder),
            }
            order = list(turns) if number % 2 == 0 else list(turns)[::-1]
            results = {name: turns[name]() for name in order}
            if number < 0:
                continue
            rounds.append({name: {field: float(results[name][field]) for field in FIELDS} for name in turns})
            print(json.dumps(rounds[-1]), file=sys.stderr, flush=True)
    ratios = {
        field: float(np.exp(np.mean([np.log(one["lvnas"][field] / one["vllm"][field]) for one in rounds])))
        for field in FIELDS
    }
    write_json(options.out, {"ratios": ratios, "rounds": rounds, "provenance": provenance()})
    print(json.dumps(ratios, indent=1))


if __name__ == "__main__":
    main()
