"""The plots of `analyse.py`."""

from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from curves import Curve
from matplotlib import pyplot
from matplotlib.ticker import LogLocator

OURS = ("score",)
STARTS = ("restart", "charged", "inherit")


def comparison(cells: dict, tables: list[list[dict]], path: Path) -> None:
    """Per budget: each method's test loss minus uniform's, with intervals, over the spread of random plans."""
    plans = list(dict.fromkeys((e["start"], e["method"]) for table in tables for e in table))
    plans.sort(key=lambda plan: STARTS.index(plan[0]))  # else in the order of the tables
    labels = [method + ("" if start == "restart" else f" ({start})") for start, method in plans]
    figure, axes = pyplot.subplots(
        1, len(tables), figsize=(4.2 * len(tables) + 1.8, 0.26 * len(plans) + 1.2), squeeze=False, sharey=True
    )
    for axis, table in zip(axes[0], tables, strict=True):
        places = np.array([plans.index((e["start"], e["method"])) for e in table])
        middle = np.array([e["vs_uniform"][0] for e in table])
        ends = np.array([e["vs_uniform"][1:] for e in table]).T
        colours = ["tab:blue" if e["method"] in OURS else "0.6" for e in table]
        axis.axvline(0, color="black", lw=0.8)
        axis.barh(places, middle, color=colours, height=0.6, zorder=2)
        axis.errorbar(
            middle, places, xerr=np.abs(ends - middle), fmt="none", color="black", lw=1, capsize=2, zorder=3
        )
        draws = [
            row["test"] - cell["uniform", "restart"]["test"]
            for key, cell in cells.items()
            if key[2] == table[0]["budget"]
            for (method, start), row in cell.items()
            if method.startswith("random-") and start == "restart"
        ]
        axis.axvspan(
            *np.percentile(draws, [10, 90]), color="tab:orange", alpha=0.18, zorder=0, label="80% of random"
        )
        axis.set_xlim(-0.4, 0.7)
        axis.set_yticks(range(len(plans)), labels)
        axis.set_title(f"budget: uniform rank {table[0]['budget']:g}")
        axis.set_xlabel("test loss - uniform's, nats (left is better)")
        axis.legend(loc="lower right", fontsize=8, frameon=False)
    axes[0, 0].invert_yaxis()
    _save(figure, path)


def curves(runs: dict[str, list[Curve]], path: Path) -> None:
    """Per run and task: test loss against the budget, `score` and uniform ranks."""
    if not runs:
        return
    tasks = max(len(lines) for lines in runs.values())
    figure, axes = pyplot.subplots(
        len(runs), tasks, figsize=(3.1 * tasks, 3.2 * len(runs)), squeeze=False, sharey="row"
    )
    for places, (name, lines) in zip(axes, runs.items(), strict=True):
        for axis, curve in zip(places, lines, strict=False):
            axis.plot(*zip(*curve.uniform.items(), strict=True), "o-", color="0.5", ms=4, label="uniform")
            axis.plot(*zip(*curve.score.items(), strict=True), "o-", color="tab:blue", ms=4, label="score")
            axis.axvline(curve.sufficient, color="0.5", lw=0.8, ls=":")
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:.2g}")
            axis.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
            axis.yaxis.set_minor_formatter("{x:.1g}")
            axis.set_title(curve.task)
            axis.set_xlabel("parameters, in uniform ranks")
        places[0].set_ylabel(f"test loss, nats\n{name.replace('; ', chr(10))}")
        places[0].legend(frameon=False)
        for axis in places[len(lines) :]:
            axis.set_axis_off()
    _save(figure, path)


def _save(figure: pyplot.Figure, path: Path) -> None:
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
