"""Runs a list of operations on one in-process engine, in a process of its own: `python ragged_job.py JOB RESULT`.

A process of its own, because LVNAS_RAGGED is read once when vLLM loads its plugins. The job's JSON holds
`engine` (arguments of vllm.LLM), `adapters` (name -> folder) and `steps`; the result one value per step.
"""

import json
import os
import sys
from pathlib import Path

import torch
from PIL import Image

if "torchvision" in os.environ.get("PYTHONPATH", ""):
    # scripts/setup's copy. Its operators need CUDA's libraries; its Python part, all that Qwen2-VL's image
    # processor uses, needs these two declared.
    for operator in ("nms", "qnms"):
        torch.library.define(
            f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        )

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest


class Job:
    def __init__(self, engine, adapters):
        self.llm = LLM(enforce_eager=True, enable_prefix_caching=False, dtype="float32", seed=0, **engine)
        self.adapters = {
            name: LoRARequest(name, i, path) for i, (name, path) in enumerate(adapters.items(), 1)
        }

    def manager(self):
        return self.llm.collective_rpc(lambda worker: worker.model_runner.lora_manager._adapter_manager)[0]

    def generate(self, requests, tokens, prompt_logprobs=None):
        """Greedy ids and their log probabilities of [prompt ids, adapter or None, image file...], batched together."""
        prompts = [
            {"prompt_token_ids": ids, "multi_modal_data": {"image": [Image.open(file) for file in images]}}
            if images
            else {"prompt_token_ids": ids}
            for ids, _, *images in requests
        ]
        params = SamplingParams(
            temperature=0,
            max_tokens=tokens,
            ignore_eos=True,
            logprobs=0,
            detokenize=False,
            prompt_logprobs=prompt_logprobs,
        )
        loras = [self.adapters.get(name) for _, name, *_ in requests]
        outputs = self.llm.generate(prompts, params, lora_request=loras, use_tqdm=False)
        return [
            [
                list(out.outputs[0].token_ids),
                [next(iter(step.values())).logprob for step in out.outputs[0].logprobs],
            ]
            for out in outputs
        ]

    def load(self, name):
        return self.llm.llm_engine.add_lora(self.adapters[name])

    def unload(self, name):
        return self.llm.llm_engine.remove_lora(self.adapters[name].lora_int_id)

    def load_and_fail(self, name):
        """A load whose activation fails half way."""
        manager = self.manager()

        def broken(lora_id):
            raise OSError("the transfer broke")

        manager._bring_in = broken
        try:
            return self.load(name)
        finally:
            del manager._bring_in

    def state(self):
        manager = self.manager()
        names = {request.lora_int_id: name for name, request in self.adapters.items()}
        return {
            "capacity": manager.arena.capacity,
            "used": manager.arena.used,
            "admitted": sorted(names[key] for key in manager.ledger.sizes),
            "active": sorted(names[key] for key in manager.lora_index_to_id if key is not None),
            "table": int(manager.table.abs().sum()),
            "covered": len(manager.covered),
            "stock": sorted(type(m).__name__ for n, m in manager.modules.items() if n not in manager.covered),
        }


def main(job_path, result_path):
    job = json.loads(Path(job_path).read_text())
    runner, results = Job(job["engine"], job["adapters"]), []
    for name, *arguments in job["steps"]:
        try:
            results.append(getattr(runner, name)(*arguments))
        except Exception as error:
            results.append({"error": f"{type(error).__name__}: {error}"})
    Path(result_path).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
