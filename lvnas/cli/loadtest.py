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
@click.option("--out", type=click.Path(path_type=Path), default="loadtest", help="Report's folder.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("--allow-saturated", is_flag=True, help="Report even where the generator was the bottleneck.")
@click.option("--locust", default="", help="More options for Locust, such as '--processes 2'.")
def run(url: str, pack: Path | None, models: str | None, out: Path, as_json: bool, allow_saturated: bool,
        locust: str, **options: Any) -> None:  # fmt: skip
    """Send load to the server at URL and report per adapter and per rank class."""
    import shlex

    from lvnas_loadtest import saturation, table
    from lvnas_loadtest.options import make_workload
    from lvnas_loadtest.run import run as run_load
    from rich.console import Console

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
        return
    # A pipe has no width; the table needs more than rich's 80 columns.
    table.show(result, Console(width=None if sys.stdout.isatty() else 140))
    click.echo(f"report: {out / 'report.html'}", err=True)
    if result["canary"] and result["canary"]["wrong"]:
        raise click.ClickException("the server used a wrong adapter; see the canary answers in the report")
