"""A tensor's bytes as a torch tensor and back, and the check that every value is finite."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from lvnas.tensorfile import BrokenFile, TensorInfo

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_BITS = {  # dtype -> (width in bytes, the bits of infinity; more than that, but for the sign, is NaN)
    "F32": (4, 0x7F800000),
    "F16": (2, 0x7C00),
    "BF16": (2, 0x7F80),
}
DTYPE_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""torch's names -> safetensors' names."""


def dtype_name(dtype: str) -> str:
    """safetensors' name -> torch's name: BF16 -> bfloat16."""
    return next(name for name, short in DTYPE_NAMES.items() if short == dtype)


def torch_dtype(name: str) -> "torch.dtype":
    """safetensors' name -> torch's dtype."""
    import torch

    return {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[name]


def check_finite(tensor: TensorInfo, data: bytes | bytearray) -> None:
    """Refuses a NaN or an infinity among the values `data` of `tensor`; works on the bits.

    Raises:
        BrokenFile: there is one.
    """
    width, infinity = _BITS[tensor.dtype]
    bits, sign = np.frombuffer(data, f"<u{width}"), 1 << (8 * width - 1)
    # As signed numbers the positive ones that are not finite are the largest, as unsigned ones the negative ones are:
    # two maxima need no copy.
    if bits.size and (bits.view(f"<i{width}").max() >= infinity or bits.max() >= sign + infinity):
        magnitudes = bits & bits.dtype.type(sign - 1)
        at = int(np.argmax(magnitudes >= infinity))
        kind = "an infinity" if magnitudes[at] == infinity else "a NaN"
        raise BrokenFile(
            tensor.path, "not-finite", f"tensor {tensor.name!r} holds {kind}, first at element {at}"
        )


def as_tensor(data: bytes | bytearray, dtype: str, shape: tuple[int, ...]) -> "Tensor":
    """The tensor over `data`, without a copy."""
    import torch

    if not data:
        return torch.empty(shape, dtype=torch_dtype(dtype))
    return torch.frombuffer(data, dtype=torch_dtype(dtype)).reshape(shape)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread: factors are small, and on a busy machine its threads wait for each other at every one."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def as_bytes(tensor: "Tensor") -> memoryview:
    """The bytes of a contiguous tensor on the CPU."""
    import torch

    return memoryview(tensor.contiguous().view(torch.uint8).numpy().reshape(-1).data)
