"""`lvnas pack --merge`: the base with one adapter's updates added to its weights, as a checkpoint of its own."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from lvnas import files
from lvnas.base_weights import base_weights, shard_files
from lvnas.errors import InputError
from lvnas.lora_modules import DTYPES, Factored
from lvnas.modules import canonical_name
from lvnas.tensorfile import BrokenFile, Planned, TensorInfo, read_header, write_tensors
from lvnas.values import as_bytes, as_tensor


def merge(
    modules: Mapping[str, Factored],
    base: Path,
    out: Path,
    transposed: bool = False,
    progress: Callable[[int], None] = lambda count: None,
) -> None:
    """Writes the checkpoint in `base` to `out` with W + s B A for every module; W + s B A is rounded once, to W's type.

    Args:
        modules: the adapter's.
        out: must not exist yet; it appears when it is whole.
        transposed: the base keeps its weights as (in, out), PEFT's `fan_in_fan_out`.
        progress: called with the number of bytes just written.

    Raises:
        InputError: `out` exists, the base lacks a module or has it in another size, or its weights are no floats.
    """
    if out.exists():
        raise InputError(f"{out} exists; name a new folder for the merged checkpoint with --out")
    weights = base_weights(base)
    for name, module in modules.items():
        _check(name, module, weights, base, transposed)
    with files.atomic_folder(out) as draft:
        for path in sorted(base.iterdir()):
            if path.is_file() and path.suffix in (".json", ".jinja", ".model", ".txt"):
                shutil.copyfile(path, draft / path.name)
        for path in shard_files(base):
            tensors = list(read_header(path)[0].values())
            planned = [Planned(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors]
            write_tensors(draft / path.name, planned, _merged(tensors, modules, transposed, progress))


def _check(
    name: str, module: Factored, weights: Mapping[str, TensorInfo], base: Path, transposed: bool
) -> None:
    if name not in weights:
        raise InputError(f"base {base} has no weight for {name}; the adapter is for another base")
    weight, shape = weights[name], (module.out_features, module.in_features)
    if weight.shape != (shape[::-1] if transposed else shape):
        raise BrokenFile(
            weight.path,
            "shape-mismatch",
            f"{name} is {list(weight.shape)}, the adapter's update {list(shape)}",
        )
    if weight.dtype not in DTYPES:
        raise BrokenFile(
            weight.path,
            "wrong-dtype",
            f"{name} is {weight.dtype}; only {', '.join(DTYPES)} can be merged into",
        )


def _merged(
    tensors: list[TensorInfo],
    modules: Mapping[str, Factored],
    transposed: bool,
    progress: Callable[[int], None],
) -> Iterator[bytearray | memoryview]:
    for tensor in tensors:
        data = tensor.read()
        name = canonical_name(tensor.name).removesuffix(".weight")
        module = modules.get(name) if tensor.name.endswith(".weight") else None
        progress(tensor.nbytes)
        if module is None:
            yield data
            continue
        a_RD, b_OR = module.factors()
        delta = module.scale * (b_OR.float() @ a_RD.float())
        weight = as_tensor(data, tensor.dtype, tensor.shape)
        yield as_bytes((weight.float() + (delta.T if transposed else delta)).to(weight.dtype))
