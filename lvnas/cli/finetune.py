"""`lvnas finetune`."""

import json
from pathlib import Path

import click


@click.command()
@click.argument("adapter", type=click.Path(path_type=Path))
@click.argument("task")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the trained adapter.")
@click.option("--base", help="Base of the adapter; by default the one it names.")
@click.option("--steps", type=click.IntRange(1), default=200, show_default=True, help="Optimiser steps.")
@click.option(
    "--batch-size", type=click.IntRange(1), default=16, show_default=True, help="Examples per step."
)
@click.option("--learning-rate", type=float, default=2e-4, show_default=True, help="AdamW's peak.")
@click.option("--weight-decay", type=float, default=0.0, show_default=True, help="AdamW's.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the data's order.")
@click.option("--dtype", default="auto", show_default=True, help="Of the base's weights.")
@click.option("--gradient-checkpointing", is_flag=True, help="Less memory, more time.")
@click.option(
    "--save-every", type=click.IntRange(1), default=100, show_default=True, help="Steps between states."
)
@click.option("--json", "as_json", is_flag=True, help="Print a summary as JSON.")
def command(adapter: Path, task: str, out: Path, base: str | None, as_json: bool, **settings: object) -> None:
    """Train ADAPTER on TASK; interrupted, the same command goes on where it was."""
    from lvnas.finetune import FinetuneConfig, finetune

    report = finetune(adapter, task, out, FinetuneConfig(**settings), base=base)  # type: ignore[arg-type]
    if as_json:
        print(json.dumps({"adapter": str(out), **report}, indent=1))
        return
    final = report["losses"][-20:]
    print(
        f"{out}: {report['parameters']:,} LoRA parameters, {report['steps']} steps, "
        f"{report['epoch_seconds']:.1f} s per epoch, final loss {sum(final) / len(final):.3f}"
    )
