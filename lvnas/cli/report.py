"""`lvnas report`."""

import json
from pathlib import Path

import click


@click.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("report"), show_default=True, help="Folder."
)
@click.option("--json", "as_json", is_flag=True, help="Print the written files as JSON.")
def command(paths: tuple[Path, ...], out: Path, as_json: bool) -> None:
    """Draw PATHS: rank maps of ranks files and adapters, tables of results.json."""
    from lvnas.report import report

    written = [str(path) for path in report(paths, out)]
    print(json.dumps({"written": written}, indent=1) if as_json else "\n".join(written))
