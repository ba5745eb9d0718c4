"""Writes a run's report beside its raw data: `result.json`, `requests.csv`, `summary.md`, `report.html`."""

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lvnas.files import read_json, write_json, write_text
from lvnas_loadtest import plots, results, table
from lvnas_loadtest.pages import Page
from lvnas_loadtest.records import Record, read_records


def write(folder: Path) -> dict[str, Any]:
    """Analyses the raw data in `folder`, writes the report there and returns the result.

    Raises:
        InputError: `folder` holds no finished run.
    """
    result = results.analyse(folder)
    records = read_records(folder / "records.jsonl")
    page = Page(
        title="Load test",
        lead=lead(result["workload"]),
        problems=table.problems(result),
        tables=[*table.latency_tables(result), table.server_table(result)],
        notes=table.notes(result),
        plots=draw(result, records, read_json(folder / "run.json")),
        provenance={"provenance": result["provenance"], "workload": result["workload"]},
    )
    write_json(folder / "result.json", result)
    write_text(folder / "requests.csv", _csv(records))
    write_text(folder / "summary.md", page.markdown())
    write_text(folder / "report.html", page.html())
    return result


def lead(workload: Mapping[str, Any]) -> str:
    """The workload in one sentence."""
    loop = (
        f"{workload['users']} users"
        if workload["arrivals"] == "closed"
        else f"arrivals {workload['arrivals']}"
    )
    extent = f"{workload['requests']} requests" if workload["requests"] else f"{workload['duration']:g} s"
    return (
        f"{len(workload['adapters'])} adapters, popularity {workload['popularity']}; {loop}, {extent}; "
        f"prompts {workload['prompt_tokens']} and answers {workload['output_tokens']} tokens; "
        f"{workload['image_share']:.0%} of the requests with an image of side {workload['image_size']}; "
        f"seed {workload['seed']}"
    )


def draw(
    result: Mapping[str, Any], records: Sequence[Record], run: Mapping[str, Any]
) -> list[tuple[str, str]]:
    """The plots, each with its caption."""
    classes = result["workload"]["rank_classes"]
    groups = {record.adapter: results.rank_class(classes, record.adapter) for record in records}
    began = run["began"]
    return [
        ("Time to first token", plots.latency_plot(result, "ttft", "TTFT")),
        ("Time per output token", plots.latency_plot(result, "tpot", "TPOT")),
        ("Inter-token latency by rank class", plots.distribution_plot(records, groups)),
        ("Output tokens", plots.tokens_plot(records, began)),
        ("The server", plots.server_plot(run["samples"]["values"], began)),
    ]


def _csv(records: Sequence[Record]) -> str:
    """One line per request, warm-up included; times in seconds."""
    names = [field.name for field in dataclasses.fields(Record) if field.name not in ("itl", "text")]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*names, "tpot"])
    writer.writerows([*(getattr(record, name) for name in names), record.tpot] for record in records)
    return file.getvalue()
