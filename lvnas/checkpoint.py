"""The state of an interrupted run: tensors and plain values, written atomically, loaded without executing anything."""

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from lvnas import files
from lvnas.errors import InputError


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Writes `state` (nested dicts and lists of tensors and plain values) to `path` atomically."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    files.write_bytes(path, buffer.getvalue())


def load_state(path: Path) -> dict[str, Any]:
    """The state that `save_state` wrote, its tensors on the CPU.

    Raises:
        InputError: the file is damaged, or holds anything that would have to be executed.
    """
    try:
        if not zipfile.is_zipfile(path):  # torch.load takes anything else for its oldest format
            raise pickle.UnpicklingError("not a file that torch.save wrote")
        return torch.load(path, weights_only=True, map_location="cpu")
    except (RuntimeError, pickle.UnpicklingError) as error:
        raise InputError(f"{path} is no readable state ({error}); delete it to start again") from None
