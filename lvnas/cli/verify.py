"""`lvnas verify`."""

import dataclasses
import json
from pathlib import Path

import click


@click.command()
@click.argument("pack", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the verdict as JSON.")
def command(pack: Path, as_json: bool) -> None:
    """Check every hash, shape and value of a pack."""
    from lvnas.errors import InputError
    from lvnas.progress import byte_progress
    from lvnas.verify import verify

    with byte_progress("verifying") as advance:
        verdict = verify(pack, advance)
    if as_json:
        print(json.dumps(dataclasses.asdict(verdict), indent=1))
    else:
        for problem in verdict.problems:
            print(problem)
        for path in verdict.unlisted:
            click.echo(f"note: {path} is not in the manifest", err=True)
    if verdict.problems:
        raise InputError(f"{pack}: {len(verdict.problems)} problems; the first: {verdict.problems[0]}")
    if not as_json:
        print(f"{pack}: {verdict.adapters} adapters, {verdict.bytes:,} bytes: all as packed")
