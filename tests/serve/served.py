"""An in-process engine and the comparison of its answers with the oracle's."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cases import Case
from oracle import Oracle
from vllm import LLM, RequestOutput, SamplingParams
from vllm.lora.request import LoRARequest


class Engine:
    def __init__(self, base: Path, adapters: Mapping[str, Path], **options: Any) -> None:
        options = {"dtype": "float32", "enforce_eager": True, "seed": 0} | options
        self.llm = LLM(str(base), **options)
        self.tokenizer = self.llm.get_tokenizer()
        self.adapters = {
            name: LoRARequest(name, number, str(folder))
            for number, (name, folder) in enumerate(adapters.items(), start=1)
        }

    def generate(self, cases: Sequence[Case], logprobs: int | None = 4) -> list[RequestOutput]:
        """Greedy answers of exactly `case.tokens` tokens to all cases, submitted together."""
        prompts, params = [], []
        for case in cases:
            prompt = {"prompt_token_ids": self.tokenizer(case.text, add_special_tokens=False).input_ids}
            if case.images:
                prompt["multi_modal_data"] = {"image": case.images}
            prompts.append(prompt)
            params.append(
                SamplingParams(temperature=0, max_tokens=case.tokens, ignore_eos=True, logprobs=logprobs)
            )
        requests = [self.adapters.get(case.adapter) for case in cases]
        if not self.adapters:
            requests = None
        return self.llm.generate(prompts, params, lora_request=requests, use_tqdm=False)


def compare(oracle: Oracle, case: Case, output: RequestOutput) -> tuple[bool, float]:
    """Whether the greedy ids agree, and the largest difference of the returned log probabilities."""
    answer = output.outputs[0]
    wanted = oracle.logprobs(case, answer.token_ids)
    worst = max(
        abs(wanted[step, token].item() - entry.logprob)
        for step, entries in enumerate(answer.logprobs)
        for token, entry in entries.items()
    )
    return list(answer.token_ids) == wanted.argmax(-1).tolist(), worst
