"""The tables of a report, as text; the terminal, Markdown and HTML show the same ones."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

PARTS = {
    "adapters": "adapter",
    "rank_classes": "rank class",
    "temperature": "cold or warm",
    "content": "content",
}
SERVER = {
    "host_bytes": "host memory, MiB",
    "device_bytes": "device memory, MiB",
    "vllm:kv_cache_usage_perc": "KV cache in use, %",
    "kv_tokens": "KV cache, tokens",
    "vllm:num_requests_running": "requests running",
    "vllm:num_requests_waiting": "requests waiting",
}
GROWTH = 1.05
"""Growth of the server's memory during a run that is worth a note."""
SCALE = {"host_bytes": 2**-20, "device_bytes": 2**-20, "vllm:kv_cache_usage_perc": 100.0}


@dataclass(frozen=True, slots=True)
class Rows:
    """One table: a heading per column, and text in every cell."""

    headings: list[str]
    rows: list[list[str]]


def latency_tables(result: Mapping[str, Any]) -> list[Rows]:
    """A table per adapter, and per rank class, temperature and content where there are several; the total
    last."""
    goodput = ["goodput/s"] if result["request_goodput"] is not None else []
    headings = ["req", "fail", "req/s", "tok/s", "TTFT", "TPOT", "ITL", "E2E", *goodput]
    tables = []
    for part, title in PARTS.items():
        if part == "adapters" or len(result[part]) > 1:
            rows = [[name, *_cells(row)] for name, row in (*result[part].items(), ("all", result))]
            tables.append(Rows([title, *headings], rows))
    return tables


def server_table(result: Mapping[str, Any]) -> Rows:
    """What the server used."""
    series = result["server"]["series"]
    rows = []
    for name, title in SERVER.items():
        if name in series:
            scale = SCALE.get(name, 1)
            rows.append([title, *(f"{series[name][key] * scale:,.1f}" for key in ("mean", "max"))])
    return Rows(["server", "mean", "highest"], rows)


def notes(result: Mapping[str, Any]) -> list[str]:
    """What a reader must know beside the tables, a sentence each."""
    source = "as the server reports them" if result["server_counted"] else "numbers of chunks, not of tokens"
    found = [
        f"{result['completed']} requests in {result['duration']:.1f} s, {result['warmup_requests']} before "
        f"to warm up. Latencies are p50/p90/p99 in ms; token counts are {source}."
    ]
    if lag := result["send_lag"]:
        median, p99 = lag["median_send_lag_ms"], lag["p99_send_lag_ms"]
        found.append(f"Sent {median:.1f} ms (median) and {p99:.1f} ms (p99) after the schedule.")
    if canary := result["canary"]:
        found.append(
            f"Canary answers: {canary['checks']} checked, {canary['same']} the same, {canary['changed']} "
            f"changed, {canary['failed']} failed, {canary['wrong']} of a wrong adapter."
        )
        if canary["indistinguishable"]:
            alike = "; ".join(", ".join(group) for group in canary["indistinguishable"])
            found.append(f"The canary questions cannot tell these adapters apart: {alike}.")
    memory = result["server"]["series"].get("host_bytes")
    if memory and memory["last"] > GROWTH * memory["first"]:
        first, last = memory["first"] / 2**20, memory["last"] / 2**20
        found.append(
            f"The server's host memory grew from {first:,.0f} to {last:,.0f} MiB while it was counted."
        )
    if churn := result["churn"]:
        failed = sum(event["error"] is not None for event in churn)
        found.append(f"Adapters replaced during the load: {len(churn)}, of which {failed} failed.")
    return found


def problems(result: Mapping[str, Any]) -> list[str]:
    """What makes the run a bad one, a sentence each."""
    found = [f"do not trust the latencies: {reason}" for reason in result["generator"]["saturated"]]
    if not result["completed"]:
        found.append("no counted request was answered; give it a longer --duration, or see the errors")
    if result["canary"] and result["canary"]["wrong"]:
        wrong = next(event for event in result["canary"]["events"] if event["verdict"].startswith("wrong"))
        found.append(f"the server answered for {wrong['adapter']} with another adapter ({wrong['verdict']})")
    found += [f"failed {count} times: {error}" for error, count in list(result["errors"].items())[:5]]
    return found


def show(result: Mapping[str, Any], console: Console) -> None:
    """Prints the tables per adapter and per rank class, the server's, and the notes."""
    tables = [table for table in latency_tables(result) if table.headings[0] in ("adapter", "rank class")]
    for rows in (*tables, server_table(result)):
        print_rows(rows, console)
    for note in notes(result):
        console.print(note, markup=False, highlight=False)
    for problem in problems(result):
        console.print(problem, markup=False, highlight=False, style="red")


def print_rows(rows: Rows, console: Console) -> None:
    """Prints one table, if it has rows."""
    table = Table(header_style="bold")
    for number, heading in enumerate(rows.headings):
        table.add_column(heading, justify="right" if number else "left", overflow="fold")
    for row in rows.rows:
        table.add_row(*row)
    if rows.rows:
        console.print(table)


def _cells(row: Mapping[str, Any]) -> list[str]:
    return [
        str(row["completed"]),
        str(row["failed"]),
        f"{row['request_throughput']:.2f}",
        f"{row['output_throughput']:.1f}",
        *(_triple(row, name) for name in ("ttft", "tpot", "itl", "e2el")),
        *([] if row["request_goodput"] is None else [f"{row['request_goodput']:.2f}"]),
    ]


def _triple(row: Mapping[str, Any], name: str) -> str:
    values = [row[f"p{p}_{name}_ms"] for p in (50, 90, 99)]
    return "/".join("-" if v is None else f"{v:.0f}" if v >= 100 else f"{v:.1f}" for v in values)
