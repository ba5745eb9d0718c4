"""`lvnas inspect`."""

import json
from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument("sources", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="SOURCE...")
@click.option("--base", help="Base of a ranks file that does not name one.")
@click.option("--diff", "as_diff", is_flag=True, help="Compare two adapters, weights included.")
@click.option(
    "--plan",
    "as_plan",
    is_flag=True,
    help="Memory per layout for --adapters adapters like these, --slots resident.",
)
@click.option("--adapters", type=int, help="Adapters to plan for; by default as many as there are SOURCEs.")
@click.option("--slots", type=int, default=8, show_default=True, help="Adapters on the device at once.")
@click.option(
    "--png", type=click.Path(path_type=Path), help="Draw the rank map of the one SOURCE into this file."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    sources: tuple[Path, ...],
    base: str | None,
    as_diff: bool,
    as_plan: bool,
    adapters: int | None,
    slots: int,
    png: Path | None,
    as_json: bool,
) -> None:
    """Show what adapters hold: ranks, sizes in every layout, scale, base, hashes.

    SOURCE is an adapter's folder, a pack, or a ranks file (with --base, if it names none).
    """
    from lvnas import inspect
    from lvnas.adapters import read_adapter
    from lvnas.errors import InputError

    show: Any = _show_adapters
    if as_diff:
        if len(sources) != 2:
            raise InputError(f"--diff compares two adapters, not {len(sources)}")
        result: Any = inspect.diff(*(read_adapter(source) for source in sources))
        show = _show_diff
    elif as_plan:
        shapes = [shape for source in sources for shape in inspect.read_shapes(source, base)]
        result = inspect.plan(shapes, len(shapes) if adapters is None else adapters, slots)
        show = _show_plan
    else:
        result = [found for source in sources for found in inspect.describe(source, base)]
    if png is not None:
        _draw(result, png)
    if as_json:
        print(json.dumps(result, indent=1))
    else:
        show(result)


def _draw(result: Any, png: Path) -> None:
    from lvnas.errors import InputError
    from lvnas.report import rank_map

    if not isinstance(result, list) or len(result) != 1 or "ranks" not in result[0]:
        raise InputError("--png draws one adapter; name one adapter's folder or one ranks file")
    rank_map(result[0]["ranks"], png, title=result[0]["name"])


def _show_adapters(result: list[dict[str, Any]]) -> None:
    for found in result:
        counts = ", ".join(f"{count} x {rank}" for rank, count in found["rank_counts"].items())
        print(f"{found['name']} for {found['base'] or 'an unnamed base'}")
        print(f"  modules x rank: {counts} (mean {found['mean_rank']:.1f})")
        print(f"  parameters: {found['parameters']:,}; engine's max_lora_rank: {found['max_rank']}")
        sizes = ", ".join(f"{layout} {size / 1e6:,.1f} MB" for layout, size in found["layout_bytes"].items())
        print(f"  sizes: {sizes}; a padded slot is used to {found['used']:.0%}")
        if "dtype" in found:
            scale = ", ".join(
                f"{key} {value}" for key, value in found["scaling"].items() if not isinstance(value, dict)
            )
            print(f"  {found['dtype']}; scale: {scale}; task: {found['task'] or 'not recorded'}")
            print(
                f"  vision features: {found['vision_features']}; rows before the image: {found['pre_image_rows']}"
            )
        for name, digest in found.get("files", {}).items():
            print(f"  {digest}  {name}")
        for note in found.get("notes", ()):
            print(f"  note: {note}")


def _show_plan(result: list[dict[str, Any]]) -> None:
    for layout in result:
        engines = " + ".join(
            f"{e['max_loras']} slots of rank {e['max_lora_rank']}" for e in layout["engines"]
        )
        print(f"{layout['layout']}: {len(layout['engines'])} engine(s): {engines}")
        print(f"  device {layout['device_bytes'] / 1e6:,.1f} MB, disk {layout['disk_bytes'] / 1e6:,.1f} MB")


def _show_diff(result: dict[str, Any]) -> None:
    print(
        f"{result['first']} ({result['parameters'][0]:,} parameters), {result['second']} ({result['parameters'][1]:,})"
    )
    for which in ("only_first", "only_second"):
        for name in result[which]:
            print(f"  {which.replace('_', ' in the ')}: {name}")
    for name, distance in result["distances"].items():
        first, second = result["ranks"].get(name, (None, None))
        ranks = f", rank {first} -> {second}" if first else ""
        if distance > 1e-6 or ranks:
            print(f"  {name}: update differs by {distance:.2%}{ranks}")
    if (
        not any(result[key] for key in ("only_first", "only_second", "ranks"))
        and result["largest_distance"] <= 1e-6
    ):
        print("  the same updates")
