"""`lvnas evaluate`."""

import dataclasses
import json
from pathlib import Path

import click


@click.command()
@click.argument("adapters", nargs=-1, type=click.Path(path_type=Path))
@click.option("--base", help="By default the one that the adapters name.")
@click.option("--task", help="By default the one that each adapter names.")
@click.option("--examples", type=click.IntRange(1), help="The most test examples per task [default: all].")
@click.option(
    "--batch-size", type=click.IntRange(1), default=32, show_default=True, help="Examples at a time."
)
@click.option("--dtype", default="auto", show_default=True, help="Of the base's weights.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for results.json.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(adapters: tuple[Path, ...], out: Path | None, as_json: bool, **settings: object) -> None:
    """Measure ADAPTERS (and the base alone) on their tasks' test splits: the paper's Table 1."""
    from lvnas.evaluate import evaluate
    from lvnas.tables import print_results

    results = evaluate(adapters, out, **settings)  # type: ignore[arg-type]
    if as_json:
        print(json.dumps([dataclasses.asdict(result) for result in results], indent=1))
        return
    print_results(results)
