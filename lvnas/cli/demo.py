"""`lvnas demo`."""

import json
from pathlib import Path

import click


@click.command()
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("demo"), show_default=True, help="Folder."
)
@click.option("--search-steps", type=click.IntRange(1), default=40, show_default=True, help="Of each search.")
@click.option("--steps", type=click.IntRange(1), default=400, show_default=True, help="Of each fine-tuning.")
@click.option("--users", type=click.IntRange(1), default=4, show_default=True, help="Of the load test.")
@click.option("--duration", default="20s", show_default=True, help="Of the load test.")
@click.option("--json", "as_json", is_flag=True, help="Also print a summary as JSON, as the last line.")
def command(as_json: bool, **settings: object) -> None:
    """Watch the whole path on real digits: search, fine-tune, evaluate, pack, serve, load-test."""
    from lvnas.demo import DemoConfig, demo

    summary = demo(DemoConfig(**settings))  # type: ignore[arg-type]
    if as_json:
        print(json.dumps(summary))
