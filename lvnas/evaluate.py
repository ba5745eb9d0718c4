"""`lvnas evaluate`: the paper's Table 1: perplexity, task metric, parameters and epoch time per adapter."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lvnas import bases, files, tasks
from lvnas.adapters import read_adapter
from lvnas.errors import InputError
from lvnas.finetune import load_adapter, lora_parameters, read_facts
from lvnas.progress import track
from lvnas.tasks.batches import IGNORED, Collator, make_loader
from lvnas.tasks.metrics import METRICS

FORMAT = "lvnas-results/1"
RESULTS = "results.json"


@dataclass(kw_only=True, slots=True)
class Result:
    """One row of the table: an adapter (or the base alone) on a task's test split."""

    task: str
    adapter: str | None
    """Folder name; None for the base alone."""
    method: str | None
    """How the adapter's ranks were chosen."""
    loss: float
    """Mean cross-entropy of the answers' tokens in nats, end of turn excluded."""
    perplexity: float
    """exp(loss)."""
    perplexity_with_end: float
    """The paper's: exp of the mean over the end-of-turn token too."""
    metric: str
    score: float
    """Mean of the task's metric over greedy answers, 0..1."""
    examples: int
    parameters: int
    """LoRA parameters."""
    share: float
    """LoRA parameters / the base's parameters."""
    epoch_seconds: float | None
    """Seconds of one epoch of the fine-tuning that made the adapter, as it was measured there."""


def evaluate(
    adapters: Sequence[Path],
    out: Path | None = None,
    *,
    base: str | None = None,
    task: str | None = None,
    examples: int | None = None,
    batch_size: int = 32,
    dtype: str = "auto",
) -> list[Result]:
    """Evaluates every adapter on its task's test split, after the base alone on each of those tasks.

    Args:
        adapters: adapter folders; with none, `base` and `task` say what to evaluate.
        out: folder for `results.json`, if any.
        base, task: where an adapter's lvnas.json does not say them, or to override it.
        examples: the most examples per task; all of the test split by default.

    Raises:
        InputError: no such adapter, base or task; adapters of different bases; nothing to evaluate.
    """
    if out is not None:
        files.check_out(Path(out))
    jobs = _jobs([Path(adapter) for adapter in adapters], task)
    named = [job.facts for job in jobs if job.adapter]
    base = base or _only({facts.get("base") for facts in named}, "base")
    features = {facts.get("vision_features", "reference") for facts in named} or {"reference"}
    loaded = {job.task: tasks.load_task(job.task) for job in jobs}
    model, processor = bases.load(base, dtype=dtype, vision_features=_only(features, "vision_features"))
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    model.to(device).eval()
    results = [
        _judge(job, model, processor, loaded[job.task], examples, batch_size)
        for job in track(jobs, "evaluating")
    ]
    if out is not None:
        made = files.provenance(base=base, adapters=[str(adapter) for adapter in adapters])
        rows = [asdict(result) for result in results]
        files.write_json(Path(out) / RESULTS, {"format": FORMAT, "rows": rows, "provenance": made})
    return results


@dataclass(frozen=True, slots=True)
class _Job:
    task: str
    adapter: Path | None
    facts: dict[str, Any]


def _jobs(adapters: Sequence[Path], task: str | None) -> list[_Job]:
    """The base alone and every adapter, task by task."""
    by_task: dict[str, list[_Job]] = {task: []} if task else {}
    for adapter in adapters:
        facts = read_facts(adapter)
        name = task or facts.get("task")
        if name is None:
            raise InputError(f"{adapter} does not say which task it is for; give it with --task")
        read_adapter(adapter, name="adapter")  # refused before the base is loaded
        by_task.setdefault(name, []).append(_Job(name, adapter, facts))
    if not by_task:
        raise InputError("nothing to evaluate: give adapter folders, or --base and --task")
    return [job for name, jobs in by_task.items() for job in (_Job(name, None, {}), *jobs)]


def _judge(
    job: _Job, model: nn.Module, processor: Any, task: tasks.Task, examples: int | None, batch_size: int
) -> Result:
    """One row; `model` is the base again afterwards."""
    chosen = task.splits["test"][:examples]
    size = sum(parameter.numel() for parameter in model.parameters())
    adapted = load_adapter(model, job.adapter) if job.adapter else None
    judged = (adapted or model).to(next(model.parameters()).device).eval()
    loss, with_end = answer_loss(judged, processor, chosen, batch_size)
    if not math.isfinite(loss):
        who = job.adapter or "the base alone"
        raise InputError(
            f"the loss of {who} on {job.task} is {loss}: weights that overflow, or answers without text"
        )
    answers = generate(judged, processor, chosen, batch_size)
    metric = METRICS[task.metric]
    scores = [metric(given, example.assistant) for given, example in zip(answers, chosen, strict=True)]
    parameters = lora_parameters(judged)
    if adapted is not None:
        adapted.unload()
    return Result(
        task=job.task,
        adapter=job.adapter.name if job.adapter else None,
        method=_method(job.facts),
        loss=loss,
        perplexity=math.exp(loss),
        perplexity_with_end=math.exp(with_end),
        metric=task.metric,
        score=sum(scores) / len(scores),
        examples=len(chosen),
        parameters=parameters,
        share=parameters / size,
        epoch_seconds=job.facts.get("finetune", {}).get("epoch_seconds"),
    )


@torch.no_grad()
def answer_loss(
    model: nn.Module, processor: Any, examples: Sequence[tasks.Example], batch_size: int
) -> tuple[float, float]:
    """Mean cross-entropy per answer token in nats: without the end-of-turn token, and with it."""
    sums = torch.zeros(2, dtype=torch.float64)
    counts = torch.zeros(2, dtype=torch.float64)
    device = next(model.parameters()).device
    end = processor.tokenizer.convert_tokens_to_ids("<|eot_id|>")
    for batch in make_loader(examples, processor, batch_size):
        labels = batch.pop("labels")[:, 1:]
        logits = (
            model(**{name: value.to(device) for name, value in batch.items()}).logits[:, :-1].float().cpu()
        )
        losses = nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
        ).view_as(labels)
        for which, kept in enumerate(((labels != IGNORED) & (labels != end), labels != IGNORED)):
            sums[which] += losses[kept].double().sum()
            counts[which] += kept.sum()
    without_end, with_end = (sums / counts).tolist()
    return without_end, with_end


@torch.no_grad()
def generate(
    model: Any, processor: Any, examples: Sequence[tasks.Example], batch_size: int, new_tokens: int = 32
) -> list[str]:
    """Greedy answers of at most `new_tokens` tokens."""
    collate = Collator(processor)
    device = next(model.parameters()).device
    answers = []
    for start in range(0, len(examples), batch_size):
        prompts = collate.prompts(examples[start : start + batch_size])
        prompts = {name: value.to(device) for name, value in prompts.items()}
        ids = model.generate(**prompts, max_new_tokens=new_tokens, do_sample=False)
        new = ids[:, prompts["input_ids"].shape[1] :]
        answers += processor.batch_decode(new, skip_special_tokens=True)
    return [answer.strip() for answer in answers]


def _method(facts: dict[str, Any]) -> str | None:
    made = facts.get("provenance", {})
    return made.get("method") or made.get("derived", {}).get("method")


def _only(values: set[str | None], what: str) -> str:
    """The one value of a set."""
    if len(values) != 1 or None in values:
        named = ", ".join(sorted(str(value) for value in values)) or "none"
        raise InputError(
            f"the adapters must share one {what}, theirs: {named}; evaluate them apart or give --{what}"
        )
    return next(iter(values))  # type: ignore[return-value]
