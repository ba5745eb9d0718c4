"""The plots of a report, as SVG text to put into a page."""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lvnas_loadtest.records import Record

STYLE: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
"grid.alpha": 0.3,
         "svg.fonttype": "none", "svg.hashsalt": "lvnas", "font.family": "sans-serif"}  # fmt: skip
SIZE = (5.6, 2.9)


def plot(draw: Callable[[Axes], None], size: tuple[float, float] = SIZE) -> str:
    """The SVG element that `draw` makes."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.add_subplot())
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()[file.getvalue().index("<svg") :]


def latency_plot(result: Mapping[str, Any], metric: str, title: str) -> str:
    """p50, p90 and p99 of a metric, one line per adapter."""
    rows = {name: row for name, row in result["adapters"].items() if row[f"p50_{metric}_ms"] is not None}

    def draw(axes: Axes) -> None:
        for height, row in enumerate(rows.values()):
            values = [row[f"p{p}_{metric}_ms"] for p in (50, 90, 99)]
            axes.plot(values, [height] * 3, color="0.6", linewidth=1, zorder=1)
            for value, marker in zip(values, "o|D", strict=True):
                axes.plot(value, height, marker=marker, color="C0", markersize=6, linestyle="")
        axes.set_yticks(range(len(rows)), list(rows))
        axes.set_ylim(max(len(rows), 1) - 0.5, -0.5)
        axes.set_xlim(left=0)
        axes.set_xlabel(f"{title}, ms (circle p50, bar p90, diamond p99)")

    return plot(draw, (SIZE[0], max(1.6, 0.9 + 0.24 * len(rows))))


def distribution_plot(records: Sequence[Record], groups: Mapping[str, str]) -> str:
    """How the inter-token latencies are distributed, one line per rank class."""

    def draw(axes: Axes) -> None:
        for group in sorted(set(groups.values())):
            gaps = np.sort(
                [gap * 1000 for record in records if groups[record.adapter] == group for gap in record.itl]
            )
            if len(gaps):
                shares = np.arange(1, len(gaps) + 1) / len(gaps)
                shown = shares >= 0.01  # chunks that came together make gaps of microseconds
                axes.step(gaps[shown], shares[shown], label=group)
        axes.set_xscale("log")
        axes.set_xlabel("inter-token latency, ms")
        axes.set_ylabel("share at most this")
        if axes.lines:
            axes.legend(frameon=False)

    return plot(draw)


def tokens_plot(records: Sequence[Record], began: float) -> str:
    """Output tokens in each second of the run."""
    times = [record.start - began + record.ttft + t for record in records if record.ttft is not None
             for t in np.cumsum([0.0, *record.itl])]  # fmt: skip

    def draw(axes: Axes) -> None:
        if times:
            edges = np.arange(np.floor(min(times)), np.ceil(max(times)) + 1)
            counts, _ = np.histogram(times, edges)
            axes.stairs(counts, edges, fill=True, alpha=0.6)
        axes.set_xlabel("seconds since the load began")
        axes.set_ylabel("output tokens/s")

    return plot(draw)


def server_plot(samples: Sequence[Mapping[str, Any]], began: float) -> str:
    """Memory over the run, and the requests that the server runs and keeps waiting."""

    def draw(axes: Axes) -> None:
        times = [sample["time"] - began for sample in samples]
        for name, label in (("host_bytes", "host memory"), ("device_bytes", "device memory")):
            if any(sample[name] is not None for sample in samples):
                axes.plot(times, [(sample[name] or 0) / 2**20 for sample in samples], label=label)
        axes.set_xlabel("seconds since the load began")
        axes.set_ylabel("MiB")
        axes.set_ylim(bottom=0)
        right = axes.twinx()
        for name, label in (("running", "running"), ("waiting", "waiting")):
            values = [sample["metrics"].get(f"vllm:num_requests_{name}") for sample in samples]
            if any(value is not None for value in values):
                right.plot(times, [value or 0.0 for value in values], linestyle=":", label=label, color="0.4"
                           if name == "running" else "C3")  # fmt: skip
        right.set_ylabel("requests (dotted)")
        right.set_ylim(bottom=0)
        right.grid(visible=False)
        lines = [*axes.lines, *right.lines]
        if lines:
            axes.legend(handles=lines, frameon=False, loc="lower right")

    return plot(draw)
