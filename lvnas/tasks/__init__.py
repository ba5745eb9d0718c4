"""Tasks: images, questions and answers in The Cauldron's schema, split by image."""

from lvnas.tasks.registry import CAULDRON, EMBEDDED, load_task, task_names
from lvnas.tasks.task import SPLITS, Example, Task

__all__ = ["CAULDRON", "EMBEDDED", "SPLITS", "Example", "Task", "load_task", "task_names"]
