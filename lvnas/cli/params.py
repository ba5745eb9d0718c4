"""`lvnas params`."""

import dataclasses
import json
from pathlib import Path

import click


@click.command()
@click.option("--base", default="tiny", show_default=True, help="Short name, Hub id or folder.")
@click.option("--targets", help="Groups or module names, comma-separated [default: all].")
@click.option("--rank", type=int, help="The same rank on every target module.")
@click.option("--ranks", type=click.Path(path_type=Path), help="A ranks file instead.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(base: str, targets: str | None, rank: int | None, ranks: Path | None, as_json: bool) -> None:
    """Count LoRA parameters exactly, without loading weights."""
    from lvnas.params import count

    found = count(base, targets=targets, rank=rank, ranks=ranks)
    if as_json:
        print(json.dumps(dataclasses.asdict(found), indent=1))
        return
    print(
        f"{found.parameters:,} LoRA parameters in {found.modules} modules, "
        f"{found.share:.2%} of the base's {found.base_parameters:,}"
    )
