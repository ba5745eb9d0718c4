"""The Cauldron (HuggingFaceM4/the_cauldron), split by image: it has only a train split of its own."""

import os
from pathlib import Path

from lvnas.errors import InputError
from lvnas.tasks.task import Task, limited, split_by_image

HUB_ID = "HuggingFaceM4/the_cauldron"
MIRROR = "LVNAS_CAULDRON"
"""Environment variable: the folder of a downloaded copy, `<subset>/*.parquet`."""


def cauldron_task(name: str, metric: str, sizes: dict[str, int] | None = None) -> Task:
    """The subset `name`, from the Hub or from the copy that $LVNAS_CAULDRON names.

    Raises:
        InputError: the subset cannot be had.
    """
    from datasets import load_dataset

    mirror = os.environ.get(MIRROR)
    try:
        if mirror:
            files = sorted(str(path) for path in (Path(mirror) / name).glob("*.parquet"))
            if not files:
                raise InputError(f"{MIRROR}={mirror} holds no {name}/*.parquet; download the subset there")
            rows = load_dataset("parquet", data_files=files, split="train")
        else:
            rows = load_dataset(HUB_ID, name, split="train")
    except (OSError, ConnectionError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"task {name!r} needs {HUB_ID}, which cannot be had ({error}); "
            f"go online, or set {MIRROR} to the folder of a downloaded copy"
        ) from None
    return Task(name, limited(split_by_image(rows), sizes), metric)
