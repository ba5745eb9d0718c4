"""Parity of one variant of checkpoint, engine and semantics, in a process of its own: prints a JSON object."""

import json
import os
import subprocess
import sys
from pathlib import Path

import conftest


def run(folder: Path, environment: dict[str, str] | None = None, **variant: object) -> dict:
    """What `main` returns for `variant`, from a new process."""
    done = subprocess.run(
        [sys.executable, __file__, str(folder), json.dumps(variant)],
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (result,) = (line for line in done.stdout.splitlines() if line.startswith("{"))  # beside vLLM's log
    return json.loads(result)


def main(folder: Path, variant: dict) -> dict:
    from cases import draw_cases
    from checkpoints import make_adapter, make_checkpoint, to_module_names
    from oracle import Oracle
    from quantised import quantise, round_inputs
    from served import Engine, compare

    base = make_checkpoint(folder / "base", **variant.get("checkpoint", {}))
    specs = {name: conftest.ADAPTERS[name] for name in variant.get("adapters", [])}
    adapters = {
        name: make_adapter(base, folder / name, i, **spec) for i, (name, spec) in enumerate(specs.items())
    }
    semantics, quantised, served = variant.get("semantics", {}), variant.get("quantised"), base
    if quantised:
        served = folder / "quantised"
        layers = quantise(base, served, **quantised)
    oracle = Oracle(base, adapters, **semantics)
    if quantised and quantised["scheme"] == "int8":
        round_inputs(oracle.model, layers)
    if variant.get("module_names"):
        to_module_names(base, drop_head=variant.get("checkpoint", {}).get("tie", False))
    renamed = {"features": "vision_features", "pre_image_rows": "pre_image_rows"}
    overrides = {renamed[name]: value for name, value in semantics.items()}
    lora = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 16} if adapters else {}
    options = {**conftest.LIMITS, **lora, "hf_overrides": overrides, **variant.get("engine", {})}
    engine = Engine(served, adapters, disable_log_stats=False, **options)
    cases = draw_cases(
        variant.get("seed", 0), variant.get("count", 24), [None, *adapters], **variant.get("draw", {})
    )
    for case in cases:
        case.tokens = variant.get("tokens", case.tokens)
    results = [
        compare(oracle, case, output) for case, output in zip(cases, engine.generate(cases), strict=True)
    ]
    counters = {metric.name: getattr(metric, "value", None) for metric in engine.llm.get_metrics()}
    return {
        "cases": len(cases),
        "same": sum(same for same, _ in results),
        "worst": max(worst for _, worst in results),
        "mean": sum(worst for _, worst in results) / len(results),
        "preemptions": counters["vllm:num_preemptions"],
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), json.loads(sys.argv[2]))))
