"""A search in several processes (torchrun, Accelerate): each looks at its share of every batch.

Losses and gradients are averaged over the processes, so that all take the same steps and find the same gains;
files are written by the first. In one process nothing here does anything.
"""

import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lvnas.errors import InputError


def join() -> torch.device:
    """Joins the processes that torchrun or Accelerate started, if any; the device of this one."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        return PartialState(cpu=not torch.accelerator.is_available()).device
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def place() -> tuple[int, int]:
    """This process's number, and how many there are."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def is_first() -> bool:
    """Whether this process is the one that writes files and shows progress."""
    return place()[0] == 0


def wait() -> None:
    """Until all processes are here."""
    if place()[1] > 1:
        dist.barrier()


def share(ids: Sequence[int]) -> list[int]:
    """This process's part of a batch's examples.

    Raises:
        InputError: the batch cannot be parted evenly.
    """
    number, count = place()
    if len(ids) % count:
        raise InputError(f"batch size {len(ids)} cannot be shared evenly by {count} processes")
    return list(ids[number::count])


def alone(what: str) -> None:
    """Raises InputError if there are several processes."""
    if place()[1] > 1:
        raise InputError(f"{what} runs in one process, not in {place()[1]}")


def mean(value: float) -> float:
    """The mean of `value` over the processes."""
    if place()[1] == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64, device=_device())
    dist.all_reduce(total)
    return total.item() / place()[1]


def gather(values: Sequence[Any]) -> list[Any]:
    """The values of all processes, one process after the other."""
    count = place()[1]
    if count == 1:
        return list(values)
    parts: list[Any] = [None] * count
    dist.all_gather_object(parts, list(values))
    return [value for part in parts for value in part]


def average_gradients(leaves: Iterable[Tensor]) -> None:
    """Averages `grad` of every leaf over the processes, in place; one that no process reached keeps None."""
    count = place()[1]
    if count == 1:
        return
    leaves = [leaf for leaf in leaves if leaf.requires_grad]
    reached = torch.tensor([leaf.grad is not None for leaf in leaves], dtype=torch.float32, device=_device())
    dist.all_reduce(reached)
    chosen = [leaf for leaf, processes in zip(leaves, reached.tolist(), strict=True) if processes]
    if not chosen:
        return
    for leaf in chosen:
        if leaf.grad is None:
            leaf.grad = torch.zeros_like(leaf)
    gradients: list[Any] = [leaf.grad for leaf in chosen]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= count
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def copy_from_first(tensors: Iterable[Tensor]) -> None:
    """Gives every process the first one's values, in place."""
    if place()[1] > 1:
        for tensor in tensors:
            dist.broadcast(tensor.data, src=0)


def _device() -> torch.device:
    """Where the processes' backend moves tensors."""
    return torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
