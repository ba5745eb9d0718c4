"""The page of a comparison: the levels, the ratios with their confidence intervals, and a plot of each round."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from lvnas_loadtest.pages import Page
from lvnas_loadtest.plots import plot
from lvnas_loadtest.table import Rows

COLUMNS = {
    "host_bytes": ("host MiB", 2**-20, "{:,.0f}"),
    "device_bytes": ("device MiB", 2**-20, "{:,.0f}"),
    "kv_tokens": ("KV tokens", 1.0, "{:,.0f}"),
    "adapter_bytes": ("adapters MiB", 2**-20, "{:,.1f}"),
    "adapters_per_gib": ("adapters / GiB", 1.0, "{:,.0f}"),
    "request_throughput": ("req/s", 1.0, "{:.2f}"),
    "output_throughput": ("tok/s", 1.0, "{:.1f}"),
    "median_ttft_ms": ("TTFT p50 ms", 1.0, "{:.1f}"),
    "p99_ttft_ms": ("TTFT p99 ms", 1.0, "{:.1f}"),
    "median_tpot_ms": ("TPOT p50 ms", 1.0, "{:.2f}"),
    "p99_tpot_ms": ("TPOT p99 ms", 1.0, "{:.2f}"),
    "failed": ("failed", 1.0, "{:.0f}"),
}
RATIOS = (
    *("host_bytes", "device_bytes", "kv_tokens", "adapter_bytes"),
    *("output_throughput", "median_ttft_ms", "median_tpot_ms"),
)


def comparison_page(comparison: Mapping[str, Any]) -> Page:
    """The page of what `compare.compare` returns."""
    from lvnas_loadtest.report import lead

    rounds = {name: values for name, values in comparison["rounds"].items() if values}
    problems = [f"{name} did not run: {error}" for name, error in comparison["errors"].items()]
    for name, values in rounds.items():
        problems += [
            f"{name}: {reason}" for reason in sorted({r for value in values for r in value["saturated"]})
        ]
        if empty := sum(not value["completed"] for value in values):
            problems.append(f"{name} answered no counted request in {empty} of {len(values)} rounds")
        if wrong := sum(value["wrong_adapter"] or 0 for value in values):
            problems.append(f"{name} answered {wrong} times with a wrong adapter")
    plots = [
        (COLUMNS[name][0], _bars(rounds, name))
        for name in ("output_throughput", "host_bytes", "device_bytes", "median_ttft_ms", "median_tpot_ms")
        if any(value[name] is not None for values in rounds.values() for value in values)
    ]
    count = max(map(len, rounds.values()))
    return Page(
        title="Comparison of deployments",
        lead=f"{lead(comparison['workload'])}; {count} rounds in turns",
        problems=problems,
        tables=[levels(rounds), ratio_table(comparison["ratios"])],
        notes=[
            "Levels are means over the rounds; ratios are geometric means of the rounds' ratios with their 95% "
            "confidence interval. Memory is the highest sample while loaded. Adapters: what those resident at once "
            "take, by the arithmetic of lvnas inspect --plan, and how many of them fit in one GiB."
        ],
        plots=plots,
        provenance={name: comparison[name] for name in ("provenance", "workload", "flags")},
    )


def levels(rounds: Mapping[str, Sequence[Mapping[str, Any]]]) -> Rows:
    """A row per deployment; columns that no deployment has are left out."""
    shown = {
        name: column
        for name, column in COLUMNS.items()
        if any(value[name] is not None for values in rounds.values() for value in values)
    }
    rows = []
    for deployment, values in rounds.items():
        cells = []
        for name, (_, scale, form) in shown.items():
            known = [value[name] for value in values if value[name] is not None]
            cells.append(form.format(scale * sum(known) / len(known)) if known else "-")
        rows.append([deployment, *cells])
    return Rows(["deployment", *(title for title, _, _ in shown.values())], rows)


def ratio_table(ratios: Sequence[Mapping[str, Any]]) -> Rows:
    """A row per effect: `1.31 [1.25, 1.37]`."""
    shown = [name for name in RATIOS if any(effect["ratios"][name] for effect in ratios)]
    rows = [
        [
            f"{effect['effect']} ({effect['of']} / {effect['to']})",
            *(_ratio(effect["ratios"][name]) for name in shown),
        ]
        for effect in ratios
    ]
    return Rows(
        ["ratio", *(COLUMNS[name][0].removesuffix(" ms").removesuffix(" MiB") for name in shown)], rows
    )


def _ratio(value: Mapping[str, float] | None) -> str:
    if value is None:
        return "-"
    interval = f" [{value['low']:.2f}, {value['high']:.2f}]" if "low" in value else ""
    return f"{value['ratio']:.2f}{interval}"


def _bars(rounds: Mapping[str, Sequence[Mapping[str, Any]]], name: str) -> str:
    title, scale, _ = COLUMNS[name]

    def draw(axes: Axes) -> None:
        for height, values in enumerate(rounds.values()):
            known = [value[name] * scale for value in values if value[name] is not None]
            if known:
                axes.barh(height, sum(known) / len(known), color="C0", alpha=0.5)
                axes.plot(known, [height] * len(known), "k.", markersize=4)
        axes.set_yticks(range(len(rounds)), list(rounds))
        axes.invert_yaxis()
        axes.set_xlabel(f"{title} (bar: mean, dots: rounds)")

    return plot(draw)
