"""`lvnas bases`."""

import json
import os

import click


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(as_json: bool) -> None:
    """List the bases' short names; any Hub id or checkpoint folder works as well."""
    from lvnas.bases import cache_folder
    from lvnas.bases.registry import HUB

    trained = sorted((cache_folder() / "bases").glob("tiny-*/config.json"))
    rows = {"tiny": os.path.dirname(trained[-1]) if trained else "trained on first use"} | HUB
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    for name, place in rows.items():
        print(f"{name:24}{place}")
