"""Progress bars on stderr for what takes long."""

import contextlib
from collections.abc import Callable, Collection, Iterator
from typing import Generic, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

Item = TypeVar("Item")


class track(Generic[Item]):
    """Iterates over `items` under a bar named `title`; `note` shows a word at the bar's end.

    Without a terminal it prints one line at the start and one at the end instead.
    """

    def __init__(self, items: Collection[Item], title: str) -> None:
        self.items = items
        self.title = title
        self.console = Console(stderr=True)
        self.text = ""

    def note(self, text: str) -> None:
        """Shows `text` behind the bar."""
        self.text = text
        if self.console.is_terminal:
            self.bar.update(self.task, note=text)

    def __iter__(self) -> Iterator[Item]:
        if not self.console.is_terminal:
            self.console.print(f"{self.title}: {len(self.items)} steps", markup=False, highlight=False)
            yield from self.items
            self.console.print(f"{self.title}: done {self.text}".rstrip(), markup=False, highlight=False)
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=self.console) as self.bar:
            self.task = self.bar.add_task(self.title, total=len(self.items), note="")
            for item in self.items:
                yield item
                self.bar.advance(self.task)


@contextlib.contextmanager
def byte_progress(what: str) -> Iterator[Callable[[int], None]]:
    """Shows bytes done and their speed while the block runs; yields the function to call with each count."""
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
