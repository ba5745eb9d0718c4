"""`lvnas derive`."""

import json
from pathlib import Path

import click


@click.command()
@click.argument("ranks", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the adapter.")
@click.option("--base", help="Base of the adapter; by default the one that RANKS names.")
@click.option("--inherit", is_flag=True, help="Start from the update that the search trained, beside RANKS.")
@click.option("--scaling", help="constant, alpha (alpha / r) or rslora; by default the one that RANKS names.")
@click.option(
    "--seed",
    type=click.IntRange(0, (1 << 32) - 1),
    default=0,
    show_default=True,
    help="Of A, where the adapter starts afresh.",
)
@click.option("--json", "as_json", is_flag=True, help="Print a summary as JSON.")
def command(
    ranks: Path, out: Path, base: str | None, inherit: bool, scaling: str | None, seed: int, as_json: bool
) -> None:
    """Make a PEFT adapter with the ranks in RANKS (ranks.json, or JSON of module: rank)."""
    from lvnas.derive import derive_file

    summary = derive_file(ranks, out, base=base, inherit=inherit, seed=seed, scaling=scaling)
    if as_json:
        print(json.dumps(summary, indent=1))
        return
    print(f"{out}: {summary['parameters']:,} LoRA parameters in {summary['modules']} modules")
