"""`lvnas loadtest`: load on an OpenAI-compatible server of many adapters, and comparisons of deployments."""

import json
import sys
from pathlib import Path
from typing import Any

import click


class RunByDefault(click.Group):
    """`lvnas loadtest URL` means `lvnas loadtest run URL`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = ["run", *args]
        return super().parse_args(ctx, args)


@click.group("loadtest", cls=RunByDefault)
def command() -> None:
    """Load-test servers of many adapters: `lvnas loadtest URL --pack PACK`."""


def workload_options(function: Any) -> Any:
    """The options that decide what is sent, shared by all subcommands."""
    option = click.option
    arrivals = "closed, poisson:RATE, gamma:RATE:CV, constant:RATE, ramp:FROM:TO (requests/s) or trace:FILE."
    popularity = "uniform, zipf:ALPHA, distinct, identical, trace or weights:A=3,B=1."
    length = "N, uniform:LOW:HIGH, normal:MEAN:SD or lognormal:MEDIAN:SIGMA."
    options = [
        option("--users", default=8, help="Concurrent users of the closed loop."),
        option("--arrivals", default="closed", help=arrivals),
        option("--popularity", default="uniform", help=popularity),
        option("--duration", default="30s", help="How long requests are sent."),
        option("--warmup", default="0s", help="Time before that; sent, not counted."),
        option("--requests", type=int, help="Send exactly this many instead."),
        option("--prompt-tokens", default="32", help=length),
        option("--output-tokens", default="32", help=length),
        option("--ignore-eos/--stop-at-eos", default=True, help="Answers of full length."),
        option("--image-share", default=0.5, help="Share of requests with an image."),
        option("--image-size", default="64", help="Side in pixels, as a length."),
        option(
            "--churn", default="0s", help="Time between two adapters replaced during the load; 0 is never."
        ),
        option("--canary-every", default="5s", help="Time between two canary questions; 0 is none."),
        option("--goodput", multiple=True, metavar="NAME:MS", help="SLO for ttft, tpot or e2el; repeatable."),
        option("--timeout", default="120s", help="When a request has failed."),
        option("--seed", default=0, help="Same seed, same requests."),
    ]
    for decorate in reversed(options):
        function = decorate(function)
    return function


@command.command(context_settings={"show_default": True})
@click.argument("url")
@click.option(
    "--pack", type=click.Path(path_type=Path), help="The served pack: its adapters, ranks and slots."
)
@click.option(
    "--models", help="Or their names, separated by commas; without either, the adapters the server lists."
)
@workload_options
@click.option("--out", type=click.Path(path_type=Path), default="loadtest-report", help="Report's folder.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("--allow-saturated", is_flag=True, help="Report even where the generator was the bottleneck.")
@click.option("--locust", default="", help="More options for Locust, such as '--processes 2'.")
def run(url: str, pack: Path | None, models: str | None, out: Path, as_json: bool, allow_saturated: bool,
        locust: str, **options: Any) -> None:  # fmt: skip
    """Send load to the server at URL and report per adapter and per rank class."""
    import shlex

    from rich.console import Console

    from lvnas_loadtest import saturation, table
    from lvnas_loadtest.options import make_workload
    from lvnas_loadtest.run import run as run_load

    workload = make_workload(url, pack, models, options)
    console = Console(stderr=True)
    with console.status("load test starts") as status:
        result = run_load(
            workload, out, shlex.split(locust), lambda seconds: status.update(f"load test: {seconds:.0f} s")
        )
    saturated = result["generator"]["saturated"]
    if saturated and not allow_saturated:
        raise click.ClickException(saturation.refusal(saturated, out))
    if as_json:
        click.echo(json.dumps(result, indent=1))
    else:  # a pipe has no width; the table needs more than rich's 80 columns
        table.show(result, Console(width=None if sys.stdout.isatty() else 140))
        click.echo(f"report: {out / 'report.html'}", err=True)
    if not result["completed"]:
        raise click.ClickException("no counted request was answered")
    if result["canary"] and result["canary"]["wrong"]:
        raise click.ClickException("the server used a wrong adapter; see the canary answers in the report")


def serving_options(function: Any) -> Any:
    """The options that say what deployments serve, and how."""
    option = click.option
    options = [
        option("--mixed", multiple=True, help="Mixed-rank adapters, as `lvnas pack` takes them; repeatable."),
        option(
            "--uniform", multiple=True, help="The same adapters at one rank, in the same order; repeatable."
        ),
        option("--flags", default="", help="vLLM's flags for every server, such as '--max-model-len 2048'."),
    ]
    for decorate in reversed(options):
        function = decorate(function)
    return function


@command.command(context_settings={"show_default": True})
@click.option("--deployments", required=True, help="base, stock-64, stock-mixed, grouped, ragged-64, ragged-mixed, "
              "or NAME=URL of a running server; separated by commas.")  # fmt: skip
@serving_options
@click.option("--slots", type=int, help="Adapters resident at once, the same for all; by default as packed.")
@click.option("--rounds", default=3, help="How often each deployment has its turn.")
@click.option(
    "--together", is_flag=True, help="Start all servers once instead of one in each turn: if memory suffices."
)
@workload_options
@click.option("--out", type=click.Path(path_type=Path), default="compare", help="Folder of the report.")
@click.option("--json", "as_json", is_flag=True, help="Print the comparison as JSON.")
def compare(deployments: str, mixed: tuple[str, ...], uniform: tuple[str, ...], flags: str, slots: int | None,
            rounds: int, together: bool, out: Path, as_json: bool, **options: Any) -> None:  # fmt: skip
    """Serve the same adapters in several ways, in turns, under the same load; ratios with confidence intervals."""
    import shlex

    from rich.console import Console

    from lvnas_loadtest.compare import Plan
    from lvnas_loadtest.compare import compare as run_comparison
    from lvnas_loadtest.compare_page import comparison_page
    from lvnas_loadtest.deployments import deployments as make_deployments
    from lvnas_loadtest.options import labels, make_workload
    from lvnas_loadtest.table import print_rows

    made = make_deployments(deployments.split(","), mixed, uniform, out / "packs", slots)
    # The address is a place holder: each turn puts its server's in its place.
    workload = make_workload("http://127.0.0.1", None, ",".join(labels(made)), options)
    console = Console(stderr=True)
    with console.status("comparison starts") as status:
        comparison = run_comparison(
            Plan(
                deployments=made,
                workload=workload,
                rounds=rounds,
                flags=shlex.split(flags),
                together=together,
            ),
            out,
            status.update,
        )
    if as_json:
        click.echo(json.dumps(comparison, indent=1))
        return
    page, screen = comparison_page(comparison), Console(width=None if sys.stdout.isatty() else 160)
    for rows in page.tables:
        print_rows(rows, screen)
    for text in (*page.problems, *page.notes):
        screen.print(text, markup=False, highlight=False)
    click.echo(f"report: {out / 'compare.html'}", err=True)


@command.command(context_settings={"show_default": True})
@click.argument("url")
@click.option("--pack", type=click.Path(path_type=Path), help="The served pack.")
@click.option("--models", help="Or the adapters' names, separated by commas.")
@click.option("--share", default=0.95, help="Share of the requests that must meet the SLOs.")
@click.option("--first", default=1.0, help="Rate of the first try, requests/s.")
@click.option("--highest", default=1000.0, help="Rate never to exceed.")
@click.option("--tolerance", default=0.1, help="Relative width at which the search stops.")
@workload_options
@click.option("--out", type=click.Path(path_type=Path), default="capacity", help="Folder of the report.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def capacity(url: str, pack: Path | None, models: str | None, share: float, first: float, highest: float,
             tolerance: float, out: Path, as_json: bool, **options: Any) -> None:  # fmt: skip
    """Find the highest rate that the server at URL carries within its SLOs (--goodput)."""
    from rich.console import Console

    from lvnas_loadtest.capacity import rate_capacity
    from lvnas_loadtest.options import make_workload

    workload = make_workload(url, pack, models, options)
    limits = {"share": share, "first": first, "highest": highest, "tolerance": tolerance}
    with Console(stderr=True).status("search starts") as status:
        found = rate_capacity(workload, out, progress=status.update, **limits)
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    for one in found["tries"]:
        verdict = "within" if one["within"] else "beyond"
        click.echo(
            f"{one['rate']:8.2f} requests/s: {one['share']:.1%} within the SLOs, {one['failed']} failed: {verdict}"
        )
    click.echo(f"highest rate within the SLOs: {found['rate']:.2f} requests/s")


@command.command(context_settings={"show_default": True})
@click.argument("deployment")
@serving_options
@click.option("--memory", help="Limit, such as 6GiB: of the device where there is one, else of the host.")
@click.option("--highest", default=64, help="Number of adapters never to exceed.")
@click.option("--out", type=click.Path(path_type=Path), default="resident", help="Folder of the result.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def resident(deployment: str, mixed: tuple[str, ...], uniform: tuple[str, ...], flags: str, memory: str | None,
             highest: int, out: Path, as_json: bool) -> None:  # fmt: skip
    """Find how many adapters fit at once in a DEPLOYMENT (stock-64, ragged-mixed, ...) within a limit of memory."""
    import shlex

    from rich.console import Console

    from lvnas.sizes import parse_bytes
    from lvnas_loadtest.deployments import adapters_of
    from lvnas_loadtest.resident import resident_capacity

    limit = parse_bytes(memory) if memory else None
    adapters = adapters_of(deployment, mixed, uniform)
    with Console(stderr=True).status("search starts") as status:
        found = resident_capacity(
            deployment, adapters, out, limit_bytes=limit, highest=highest, flags=shlex.split(flags),
            progress=status.update,
        )  # fmt: skip
    if as_json:
        click.echo(json.dumps(found, indent=1))
    if not found["adapters"]:
        reason = found["tries"][0]["error"] or "too much memory"
        raise click.ClickException(f"no adapter fits in {deployment}: {reason}")
    if as_json:
        return
    for one in found["tries"]:
        click.echo(
            f"{one['adapters']:4d} adapters: {'fit' if one['fits'] else one['error'] or 'too much memory'}"
        )
    click.echo(f"{found['adapters']} adapters fit in {deployment}")
