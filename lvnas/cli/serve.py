"""`lvnas serve`."""

import json
import shlex
from pathlib import Path

import click


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[PACK | ADAPTER...] [VLLM FLAGS]")
@click.option("--base", help="Short name, Hub id or folder; by default what the adapters name.")
@click.option("--group", help="Which group of a pack of layout `group`: one engine serves one group.")
@click.option("--runtime-adapters", is_flag=True, help="Allow loading and unloading adapters while serving.")
@click.option("--adapter-memory", help="Memory of the pool of a ragged pack, such as 512MiB.")
@click.option("--dry-run", is_flag=True, help="Check everything, print the command, start nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print what is started as JSON.")
def command(
    arguments: tuple[str, ...],
    base: str | None,
    group: str | None,
    runtime_adapters: bool,
    adapter_memory: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Serve a base with its adapters behind OpenAI's API, through vLLM.

    PACK is a folder that `lvnas pack` made; ADAPTER is a PEFT adapter's folder or NAME=FOLDER. What follows
    the first flag that is not listed here goes to vLLM as it is; its own flags override the defaults.
    """
    from lvnas.errors import InputError
    from lvnas.manifest import MANIFEST_NAME
    from lvnas.serve import ServeOptions, plan, run

    sources = list(arguments)
    first = next((i for i, part in enumerate(sources) if part.startswith("-")), len(sources))
    options = ServeOptions(
        base=base,
        group=group,
        runtime_adapters=runtime_adapters,
        adapter_memory=adapter_memory,
        flags=sources[first:],
    )
    if any((Path(part) / MANIFEST_NAME).exists() for part in options.flags):
        raise InputError(f"{' '.join(options.flags)}: put the pack before vLLM's flags")
    launch = plan(sources[:first], options)
    for note in launch.notes:
        click.echo(f"note: {note}", err=True)
    if as_json:
        adapters = {name: str(folder) for name, folder in launch.adapters.items()}
        print(json.dumps({"argv": launch.argv, "env": launch.env, "base": launch.base, "adapters": adapters}))
    else:
        variables = [f"{name}={value}" for name, value in launch.env.items()]
        click.echo(shlex.join([*variables, *launch.argv]), err=not dry_run)
    if not dry_run:
        run(launch)
