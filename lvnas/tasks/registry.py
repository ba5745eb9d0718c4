"""Task names -> tasks: embedded, The Cauldron's, or a file of the user's own."""

from pathlib import Path

from lvnas.errors import unknown
from lvnas.tasks.digits import RECIPES, embedded_task
from lvnas.tasks.task import Task

EMBEDDED = tuple(RECIPES)
CAULDRON = {
    "ai2d": "option",
    "chartqa": "relaxed",
    "docvqa": "anls",
    "infographic_vqa": "anls",
    "intergps": "option",
    "tqa": "option",
    "vsr": "yes_no",
    "vqarad": "vqarad",
    "hitab": "numeric",
    "geomverse": "numeric",
}
"""The Cauldron subsets of the paper -> their metric in `lvnas.tasks.metrics`."""


def task_names() -> tuple[str, ...]:
    """The names that `load_task` knows, besides files."""
    return EMBEDDED + tuple(CAULDRON)


def load_task(name: str, sizes: dict[str, int] | None = None) -> Task:
    """The task `name`: an embedded one, a subset of The Cauldron, or the path of a .jsonl or .parquet file.

    Args:
        name: see `task_names`.
        sizes: split -> the most examples of it.

    Raises:
        InputError: no such task, or a file that does not hold The Cauldron's schema.
    """
    if name in RECIPES:
        return embedded_task(name, sizes)
    if name in CAULDRON:
        from lvnas.tasks.cauldron import cauldron_task

        return cauldron_task(name, CAULDRON[name], sizes)
    if Path(name).suffix in (".jsonl", ".parquet"):
        from lvnas.tasks.local import local_task

        return local_task(Path(name), sizes)
    raise unknown("task", name, (*task_names(), "a .jsonl or .parquet file"))
