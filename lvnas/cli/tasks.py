"""`lvnas tasks`."""

import json
from pathlib import Path

import click


@click.command()
@click.argument("task", required=False)
@click.option(
    "--show", type=click.IntRange(1), default=3, show_default=True, help="Examples to print of TASK."
)
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the shown images of TASK as PNG.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(task: str | None, show: int, out: Path | None, as_json: bool) -> None:
    """List the tasks, or look at TASK: sizes of its splits and its first examples."""
    from lvnas import tasks

    if task is None:
        names = {"embedded": list(tasks.EMBEDDED), "the_cauldron": list(tasks.CAULDRON)}
        print(
            json.dumps(names, indent=1)
            if as_json
            else "\n".join(f"{k}: {', '.join(v)}" for k, v in names.items())
        )
        return
    loaded = tasks.load_task(task)
    sizes = {split: len(examples) for split, examples in loaded.splits.items()}
    shown = loaded.splits["train"][:show]
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        for number, example in enumerate(shown):
            for place, image in enumerate(example.images):
                image.save(out / f"{number}-{place}.png")
    if as_json:
        pairs = [{"user": example.user, "assistant": example.assistant} for example in shown]
        print(
            json.dumps({"task": task, "metric": loaded.metric, "sizes": sizes, "examples": pairs}, indent=1)
        )
        return
    print(f"{task}: metric {loaded.metric}; " + ", ".join(f"{split} {size}" for split, size in sizes.items()))
    for example in shown:
        print(f"  {example.user!r} -> {example.assistant!r}")
