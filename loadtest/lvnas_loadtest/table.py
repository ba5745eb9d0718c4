"""The tables that a person reads on the terminal."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

PARTS = {"adapters": "adapter", "rank_classes": "rank class"}


def show(result: Mapping[str, Any], console: Console) -> None:
    """Prints one table per adapter and one per rank class, the total below each."""
    goodput = result["request_goodput"] is not None
    for part, title in PARTS.items():
        if part == "rank_classes" and len(result[part]) < 2:
            continue
        table = Table(title=None, header_style="bold", expand=False)
        table.add_column(title)
        for heading in headings(goodput):
            table.add_column(heading, justify="right")
        for name, row in result[part].items():
            table.add_row(name, *cells(row, goodput))
        table.add_section()
        table.add_row("all", *cells(result, goodput))
        console.print(table)
    source = "as the server reports them" if result["server_counted"] else "are numbers of chunks"
    console.print(
        f"{result['completed']} requests in {result['duration']:.1f} s; latencies are p50/p90/p99 in ms, "
        f"token counts {source}"
    )
    for error, count in list(result["errors"].items())[:5]:
        console.print(f"failed {count} times: {error}", style="red", markup=False)


def headings(goodput: bool) -> list[str]:
    """The columns after the name."""
    return [
        "req",
        "fail",
        "req/s",
        "tok/s",
        "TTFT",
        "TPOT",
        "ITL",
        "E2E",
        *(["goodput/s"] if goodput else []),
    ]


def cells(row: Mapping[str, Any], goodput: bool) -> list[str]:
    """One group's numbers under `headings`."""
    return [
        str(row["completed"]),
        str(row["failed"]),
        f"{row['request_throughput']:.2f}",
        f"{row['output_throughput']:.1f}",
        *(_triple(row, name) for name in ("ttft", "tpot", "itl", "e2el")),
        *([f"{row['request_goodput']:.2f}"] if goodput else []),
    ]


def _triple(row: Mapping[str, Any], name: str) -> str:
    values = [row[f"p{p}_{name}_ms"] for p in (50, 90, 99)]
    return "/".join(
        "-" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.1f}" for value in values
    )
