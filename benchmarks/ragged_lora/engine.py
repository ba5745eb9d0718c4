"""One engine in a process of its own, driven line by line: `Engine(...)` starts it, `measure` times a workload."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


class Engine:
    """The parent's end. `environment` chooses the path: LVNAS_RAGGED=1, or VLLM_PLUGINS="" for stock vLLM."""

    def __init__(self, environment: dict[str, str], **arguments: Any) -> None:
        settings = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_LOGGING_LEVEL": "WARNING",
        }
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            env=os.environ | settings | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if os.environ.get("LVNAS_BENCH_DEBUG") else subprocess.DEVNULL,
            text=True,
        )
        self.start_seconds = self.ask(arguments)

    def ask(self, message: Any) -> Any:
        """Sends one line, returns the answer to it."""
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("ANSWER "):
                return json.loads(line.removeprefix("ANSWER "))
        raise RuntimeError(f"the engine ended with code {self.process.wait()}")

    def measure(self, requests: list, tokens: int) -> list[float]:
        """Seconds, by the clock and of processor time, for [prompt length, adapter folder or None] requests.

        Each gets `tokens` new tokens; all are submitted together.
        """
        return self.ask([requests, tokens])

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def serve() -> None:
    """The child: the first line has vllm.LLM's arguments, each further one a workload."""
    start, arguments = time.perf_counter(), json.loads(sys.stdin.readline())
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(
        skip_tokenizer_init=True,
        load_format="dummy",
        enable_prefix_caching=False,
        dtype="bfloat16",
        **arguments,
    )
    print("ANSWER", json.dumps(time.perf_counter() - start), flush=True)
    known: dict[str, LoRARequest] = {}
    for line in sys.stdin:
        requests, tokens = json.loads(line)
        loras = [
            folder and known.setdefault(folder, LoRARequest(Path(folder).name, len(known) + 1, folder))
            for _, folder in requests
        ]
        prompts = [{"prompt_token_ids": [1 + i % 2000 for i in range(length)]} for length, _ in requests]
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        start, processor = time.perf_counter(), time.process_time()
        lora_request = loras if arguments.get("enable_lora") else None
        llm.generate(prompts, params, lora_request=lora_request, use_tqdm=False)
        taken = [time.perf_counter() - start, time.process_time() - processor]
        print("ANSWER", json.dumps(taken), flush=True)


if __name__ == "__main__":
    serve()
