"""The result of one run: every number of the report, from the raw records."""

import datetime
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lvnas.errors import InputError
from lvnas.files import provenance, read_json, sha256
from lvnas_loadtest import saturation, stats
from lvnas_loadtest.records import Record, read_records
from lvnas_loadtest.workload import Workload


def analyse(folder: Path) -> dict[str, Any]:
    """The result of the run whose raw data (`run.json`, `records.jsonl`) is in `folder`.

    Its top level fits tools that read `vllm bench serve --save-result`; ours is under `adapters`,
    `rank_classes`, `temperature`, `generator`, `server`, `canary`, `workload`, `provenance`.

    Raises:
        InputError: `folder` holds no finished run.
    """
    run = read_json(folder / "run.json")
    try:
        workload = Workload(**run["workload"])
        records = read_records(folder / "records.jsonl")
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"no finished load test in {folder}: {error}") from None
    counted = [record for record in records if record.start >= run["began"] + workload.warmup]
    duration = stats.span(counted)
    done = [record for record in counted if record.error is None]
    send_lags = [record.start - record.scheduled for record in counted if record.scheduled is not None]

    def table(key) -> dict[str, Any]:  # type: ignore[no-untyped-def]
        groups = stats.grouped(counted, key)
        return {name: stats.summary(group, duration, workload.slo) for name, group in sorted(groups.items())}

    return {
        "date": datetime.datetime.now().strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": "openai-chat",
        "backend": "openai-chat",
        "label": "lvnas loadtest",
        "model_id": ",".join(workload.adapters),
        "num_prompts": len(counted),
        "request_rate": workload.arrivals if workload.open_loop else "inf",
        "max_concurrency": None if workload.open_loop else workload.users,
        **stats.summary(counted, duration, workload.slo),
        **stats.peaks(done),
        "warmup_requests": len(records) - len(counted),
        "adapters": table(lambda record: record.adapter),
        "rank_classes": table(lambda record: rank_class(workload.rank_classes, record.adapter)),
        "temperature": table(lambda record: "cold" if record.cold else "warm"),
        "content": table(lambda record: "image" if record.image else "text only"),
        "server_counted": all(record.counted for record in done),
        "errors": _errors(counted),
        "send_lag": stats.latency("send_lag", send_lags) if workload.open_loop else None,
        "generator": {
            "processes": run["generators"],
            "saturated": saturation.reasons(run["generators"], send_lags),
        },
        "server": server_summary(run["samples"], run["began"] + workload.warmup),
        "canary": run["canary"],
        "churn": run["churn"],
        "workload": run["workload"],
        "provenance": provenance(records_sha256=sha256(folder / "records.jsonl"), seed=workload.seed),
    }


def rank_class(classes: Mapping[str, str], adapter: str) -> str:
    """An adapter's rank class: one that a pack does not hold is the base; without a pack nothing is known."""
    return classes.get(adapter, "no adapter") if classes else "unknown rank"


def server_summary(samples: Mapping[str, Any], began: float) -> dict[str, Any]:
    """Each sampled quantity since `began`: its first, last, mean and highest value; totals also what was
    added."""
    series: dict[str, list[float]] = defaultdict(list)
    for sample in samples["values"]:
        if sample["time"] < began:
            continue
        for name in ("host_bytes", "device_bytes"):
            if sample[name] is not None:
                series[name].append(sample[name])
        for name, value in sample["metrics"].items():
            series[name].append(value)
    found: dict[str, Any] = {}
    for name, values in series.items():
        found[name] = {
            "first": values[0],
            "last": values[-1],
            "mean": sum(values) / len(values),
            "max": max(values),
        }
        if name.endswith("_total"):
            found[name]["added"] = values[-1] - values[0]
    return {"samples": len(samples["values"]), "errors": samples["errors"], "series": found}


def details(records: list[Record]) -> dict[str, Any]:
    """`vllm bench serve --save-detailed`'s lists, one entry per request."""
    return {
        "input_lens": [record.prompt_tokens for record in records],
        "output_lens": [record.output_tokens for record in records],
        "ttfts": [record.ttft or 0.0 for record in records],
        "itls": [record.itl for record in records],
        "latencies": [record.latency for record in records],
        "start_times": [record.start for record in records],
        "generated_texts": [record.text for record in records],
        "errors": [record.error or "" for record in records],
    }


def _errors(records: list[Record]) -> dict[str, int]:
    errors = stats.grouped((record for record in records if record.error), lambda record: record.error or "")
    return {error: len(group) for error, group in sorted(errors.items(), key=lambda pair: -len(pair[1]))}
