"""`lvnas pack`."""

import json
from pathlib import Path

import click

from lvnas.cli_progress import byte_progress


@click.command()
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER...")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder of the pack; adapters are added to it.",
)
@click.option("--layout", default="pad", show_default=True, help="pad, group or ragged.")
@click.option("--base", help="Base that the adapters are for; by default the one they name.")
@click.option("--dtype", help="float32, float16 or bfloat16; by default each adapter's own.")
@click.option("--slots", type=int, help="Adapters resident on the device at once (max_loras).")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON.")
def command(
    adapters: tuple[str, ...],
    out: Path,
    layout: str,
    base: str | None,
    dtype: str | None,
    slots: int | None,
    as_json: bool,
) -> None:
    """Pack PEFT adapters into a verified folder that vLLM serves.

    ADAPTER is an adapter's folder, a folder of such folders, a Hub id, or NAME=one of these.
    """
    from lvnas.pack import PackOptions, pack
    from lvnas.sources import find_adapters

    options = PackOptions(layout=layout, dtype=dtype, slots=slots)
    found = find_adapters(adapters)
    with byte_progress("packing") as advance:
        manifest = pack(found, out, options, base, advance)
    if as_json:
        print(json.dumps(manifest, indent=1))
        return
    for adapter in found:
        for note in adapter.notes:
            click.echo(f"note: {adapter.name}: {note}", err=True)
    for entry in manifest["adapters"]:
        size = f"{entry['bytes']:,} bytes, {entry['parameters']:,} parameters"
        print(f"{entry['name']}: {size}, {out / entry['path']}")
