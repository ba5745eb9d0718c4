"""Progress bars on stderr for the command line."""

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def byte_progress(what: str) -> Iterator[Callable[[int], None]]:
    """Shows bytes done and their speed while the block runs; yields the function to call with each count."""
    from rich.console import Console
    from rich.progress import (
        DownloadColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TransferSpeedColumn,
    )

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda count: bar.advance(task, count)
