"""`lvnas profile`."""

import json
from pathlib import Path

import click


@click.command()
@click.option("--base", default="tiny", show_default=True, help="Short name, Hub id or folder.")
@click.option("--targets", default="all", show_default=True, help="Groups or module names, comma-separated.")
@click.option("--ranks", default="4,8,16,32,64", show_default=True, help="The space of the searches.")
@click.option("--adapters", default=8, show_default=True, help="Adapters in a decode step, a token each.")
@click.option("--dtype", default="bfloat16", show_default=True, help="Served in bfloat16 or float32.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="File of the cost tables.")
@click.option("--json", "as_json", is_flag=True, help="Print a summary as JSON.")
def command(base: str, targets: str, ranks: str, adapters: int, dtype: str, out: Path, as_json: bool) -> None:
    """Measure what every rank costs on this device, for `lvnas search --budget-by latency --costs OUT`.

    OUT also holds the parameters and the slot bytes of every pack layout.
    """
    from lvnas.profile import profile_base
    from lvnas.task_search import parse_ranks

    summary = profile_base(
        base, out, targets=targets, ranks=parse_ranks(ranks), adapters=adapters, dtype=dtype
    )
    if as_json:
        print(json.dumps(summary, indent=1))
        return
    print(
        f"{out}: {summary['shapes']} shapes of {summary['modules']} modules; a decode step of {adapters} "
        f"adapters takes {summary['seconds_at_highest'] * 1e3:.2f} ms of LoRA at the highest rank everywhere"
    )
    check = {name: f"{seconds * 1e3:.2f} ms" for name, seconds in summary["random_plan"].items()}
    print("a random plan: " + ", ".join(f"{name} {shown}" for name, shown in check.items()))
