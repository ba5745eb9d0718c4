"""`lvnas pack`."""

import json
from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER...")
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Folder of the pack; adapters are added."
)
@click.option("--layout", default="pad", show_default=True, help="pad, group or ragged.")
@click.option("--base", help="Base that the adapters are for; by default the one they name.")
@click.option("--dtype", help="float32, float16 or bfloat16; by default each adapter's own.")
@click.option("--slots", type=int, help="Adapters resident on the device at once (max_loras).")
@click.option("--max-rank", type=int, help="Cut ranks to at most this, by SVD.")
@click.option(
    "--energy", type=float, help="Cut ranks to keep this share of the squared singular values, such as 0.99."
)
@click.option("--params", help="Cut ranks to this many parameters per adapter, such as 50M.")
@click.option(
    "--target-bytes", help="Cut ranks until each adapter's file is at most this large, such as 100MB."
)
@click.option(
    "--initial-adapter",
    type=click.Path(path_type=Path),
    help="The adapter before training (PiSSA, CorDA...).",
)
@click.option("--separate-saved", is_flag=True, help="Put modules_to_save into a file of their own.")
@click.option(
    "--merge", is_flag=True, help="Write the base with the one ADAPTER merged in, instead of a pack."
)
@click.option("--push-to-hub", "hub", metavar="OWNER[/NAME]", help="Upload the packed adapters to the Hub.")
@click.option("--private", is_flag=True, help="Make new Hub repositories private.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    adapters: tuple[str, ...], out: Path, base: str | None, merge: bool, as_json: bool, **given: Any
) -> None:
    """Pack PEFT adapters into a verified folder that vLLM serves.

    ADAPTER is an adapter's folder, a folder of such folders, a Hub id, or NAME=one of these.
    """
    from lvnas.allocate import parse_count
    from lvnas.pack import common_base, pack
    from lvnas.prepare import PackOptions
    from lvnas.progress import byte_progress
    from lvnas.sizes import parse_bytes
    from lvnas.sources import check_against_base, find_adapters

    hub, private = given.pop("hub"), given.pop("private")
    for key, parse in (("params", parse_count), ("target_bytes", parse_bytes)):
        given[key] = None if given[key] is None else int(parse(given[key]))
    options = PackOptions(**given)
    found = find_adapters(adapters)
    base = common_base(found, base)
    notes = [f"{adapter.name}: {note}" for adapter in found for note in adapter.notes] + check_against_base(
        found, base
    )
    for note in notes:
        click.echo(f"note: {note}", err=True)
    with byte_progress("merging" if merge else "packing") as advance:
        if merge:
            _merge(found, out, base, options, advance)
        else:
            manifest = pack(found, out, options, base, advance)
    if merge:
        print(json.dumps({"merged": str(out)}) if as_json else f"{base} with {found[0].name}: {out}")
        return
    uploaded = _push(out, manifest, [adapter.name for adapter in found], hub, private)
    print(json.dumps(manifest | uploaded, indent=1)) if as_json else _show(manifest, out, uploaded)


def _merge(found: list[Any], out: Path, base: str, options: Any, advance: Any) -> None:
    from lvnas.base_weights import find_base_folder
    from lvnas.errors import InputError
    from lvnas.merge import merge
    from lvnas.pack import check_initial_adapter
    from lvnas.prepare import prepare

    if len(found) != 1:
        raise InputError(f"--merge takes one adapter, not {len(found)}")
    check_initial_adapter(found, options)
    modules = prepare(found[0], options, base).layout.modules
    merge(modules, find_base_folder(base), out, found[0].config.fan_in_fan_out, advance)


def _push(
    out: Path, manifest: dict[str, Any], names: list[str], hub: str | None, private: bool
) -> dict[str, Any]:
    """Uploads the adapters of this run; {"hub": {name: address}} if any."""
    if hub is None:
        return {}
    from lvnas.hub import push

    mine = manifest | {"adapters": [entry for entry in manifest["adapters"] if entry["name"] in names]}
    return {"hub": push(out, mine, hub, private)}


def _show(manifest: dict[str, Any], out: Path, uploaded: dict[str, Any]) -> None:
    for entry in manifest["adapters"]:
        size = f"{entry['bytes']:,} bytes, {entry['parameters']:,} parameters, max rank {entry['max_rank']}"
        print(f"{entry['name']}: {size}, {out / entry['path']}")
        if errors := entry.get("truncation_errors"):
            worst = max(errors, key=errors.get)
            print(f"  {len(errors)} modules cut; largest relative error {errors[worst]:.2%} in {worst}")
    for name, address in uploaded.get("hub", {}).items():
        print(f"{name}: {address}")
    if "serving" in manifest:
        print(f"serve scripts and router configurations: {out / manifest['serving']}")
