"""`lvnas`: wires each verb to its module; a verb's command lives in `lvnas/cli/<verb>.py` as `command`."""

import importlib
import sys
import warnings
from pathlib import Path
from typing import Any

import click

from lvnas import __version__
from lvnas.errors import InputError

VERBS = tuple(sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py")))


class Verbs(click.Group):
    """Imports a verb's module only when the verb is used, so that `--help` is quick."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in VERBS:
            return None
        return importlib.import_module(f"lvnas.cli.{name}").command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] not in VERBS:
            raise click.UsageError(f"unknown command {args[0]!r}; allowed: {', '.join(VERBS)}", ctx)
        return super().resolve_command(ctx, args)


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="lvnas")
def lvnas() -> None:
    """Mixed-rank LoRA for vision-language models: search, derive, pack, serve, load-test."""


def main() -> None:
    """The console script: bad input is one line on stderr and exit code 2, never a traceback."""
    # transformers warns about a call within transformers; nobody who runs lvnas can change it.
    warnings.filterwarnings("ignore", r"`hidden_state` is deprecated", FutureWarning)
    try:
        lvnas.main(prog_name="lvnas", standalone_mode=False)
    except InputError as error:
        fail(str(error), 2)
    except click.ClickException as error:
        fail(error.format_message(), 2)
    except (KeyboardInterrupt, click.Abort):
        fail("interrupted; what was finished is kept, nothing is half-written", 130)
    except BrokenPipeError:
        sys.exit(0)
    except OSError as error:  # a full disk, a folder that may not be written to
        if error.strerror is None:
            raise
        fail(f"{error.filename or 'the system'}: {error.strerror}", 2)


def fail(message: str, code: int) -> None:
    """Prints one line and ends the process with `code`."""
    print(f"lvnas: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)
