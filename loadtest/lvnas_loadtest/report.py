"""Writes a run's report beside its raw data: `result.json`, `requests.csv`, `summary.md`, `report.html`."""

import csv
import dataclasses
import io
from pathlib import Path
from typing import Any

from lvnas.files import write_json, write_text
from lvnas_loadtest import results
from lvnas_loadtest.records import Record, read_records


def write(folder: Path) -> dict[str, Any]:
    """Analyses the raw data in `folder`, writes the report there and returns the result.

    Raises:
        InputError: `folder` holds no finished run.
    """
    result = results.analyse(folder)
    records = read_records(folder / "records.jsonl")
    write_json(folder / "result.json", result)
    write_text(folder / "requests.csv", _csv(records))
    return result


def _csv(records: list[Record]) -> str:
    """One line per request, warm-up included; times in seconds."""
    names = [field.name for field in dataclasses.fields(Record) if field.name not in ("itl", "text")]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*names, "tpot"])
    writer.writerows([*(getattr(record, name) for name in names), record.tpot] for record in records)
    return file.getvalue()
