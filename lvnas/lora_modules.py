"""An adapter's tensors put together to modules: which A and B belong together, at which rank and scale.

Shape letters: D input features, O output features, R rank.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from lvnas.adapter_config import CONFIG_NAME, MAX_RANK, AdapterConfig
from lvnas.modules import canonical_name
from lvnas.tensorfile import BrokenFile, TensorInfo
from lvnas.values import as_tensor, check_finite

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = ("F32", "F16", "BF16")
_FACTOR = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+?)\.(?P<part>lora_[ABE]|ranknum)(?:\.default)?"
    r"(?P<kind>\.weight|\.bias)?"
)


class Factored(Protocol):
    """A weight update scale * B @ A, whatever it comes from."""

    @property
    def name(self) -> str: ...
    @property
    def rank(self) -> int: ...
    @property
    def scale(self) -> float: ...
    @property
    def in_features(self) -> int: ...
    @property
    def out_features(self) -> int: ...
    def factors(self) -> "tuple[Tensor, Tensor]":
        """A_RD and B_OR."""
        ...


@dataclass(frozen=True, slots=True)
class LoraModule:
    """One module of an adapter as its file holds it; its update is scale * B_OR @ A_RD."""

    name: str
    """Full module name, transformers >= 5."""
    rank: int
    scale: float
    a: TensorInfo
    b: TensorInfo
    e: TensorInfo | None = None
    """AdaLoRA's singular values, (R, 1)."""

    @property
    def in_features(self) -> int:
        return self.a.shape[1]

    @property
    def out_features(self) -> int:
        return self.b.shape[0]

    def factors(self) -> "tuple[Tensor, Tensor]":
        """A_RD and B_OR; AdaLoRA's singular values are multiplied into A (which is then float32).

        Raises:
            BrokenFile: a NaN or an infinity, or the file has changed.
        """
        a, b = (_load(tensor) for tensor in (self.a, self.b))
        return (a if self.e is None else a.float() * _load(self.e).float()), b


def group_modules(
    config: AdapterConfig, path: Path, tensors: Mapping[str, TensorInfo]
) -> tuple[dict[str, LoraModule], dict[str, TensorInfo], list[str]]:
    """The LoRA modules by canonical name, in the model's order; all other tensors; notes.

    Args:
        path: the file to name where no tensor is at fault.
        tensors: as they are called in the adapter's files.

    Raises:
        BrokenFile: tensors that are no plain LoRA, or that the configuration contradicts.
    """
    parts: dict[str, dict[str, TensorInfo]] = {}
    saved: dict[str, TensorInfo] = {}
    for name, tensor in tensors.items():
        matched = _FACTOR.fullmatch(name)
        if matched is None:
            _refuse_special(tensor)
            saved[name] = tensor
            continue
        if matched["kind"] == ".bias":
            raise BrokenFile(tensor.path, "lora-bias", f"tensor {name!r}: vLLM has no bias on LoRA's factors")
        found = parts.setdefault(matched["module"], {})
        if matched["part"] in found:
            raise BrokenFile(
                tensor.path, "duplicate-module", f"{matched['part']} of {matched['module']} is there twice"
            )
        found[matched["part"]] = tensor
    modules: dict[str, LoraModule] = {}
    dropped = 0
    for name, found in parts.items():
        module = _module(config, name, found, path)
        if module is None:
            dropped += 1
        elif module.name in modules:
            raise BrokenFile(module.a.path, "duplicate-module", f"{module.name} is there under two names")
        else:
            modules[module.name] = module
    if not modules:
        raise BrokenFile(path, "no-lora-weights", "it holds no lora_A and lora_B tensors")
    ordered = dict(sorted(modules.items(), key=lambda item: _natural(item[0])))
    return ordered, saved, [f"{dropped} modules of rank 0 are left out"] if dropped else []


def _refuse_special(tensor: TensorInfo) -> None:
    for mark, reason, advice in (
        ("lora_magnitude_vector", "dora", "DoRA is not plain LoRA; merge it with PEFT's merge_and_unload"),
        (
            "lora_embedding_",
            "embedding-lora",
            "LoRA on embeddings is not supported; retrain without the embedding",
        ),
        (
            ".base_layer.",
            "base-weights-saved",
            "it holds base weights; save with save_embedding_layers=False",
        ),
    ):
        if mark in tensor.name:
            raise BrokenFile(tensor.path, reason, f"tensor {tensor.name!r}: {advice}")


def _module(
    config: AdapterConfig, name: str, found: Mapping[str, TensorInfo], path: Path
) -> LoraModule | None:
    """The module `name` (as in the file) from its parts; None for AdaLoRA's rank 0."""
    for part in ("lora_A", "lora_B", "lora_E") if config.adalora else ("lora_A", "lora_B"):
        if part not in found:
            raise BrokenFile(path, f"missing-{part[-1]}", f"module {name} has no {part}")
    if not config.adalora and (extra := sorted(set(found) - {"lora_A", "lora_B"})):
        raise BrokenFile(path, "adalora-tensor", f"module {name} has {extra[0]}, but peft_type is LORA")
    a, b, e = found["lora_A"], found["lora_B"], found.get("lora_E")
    for tensor in (a, b) if e is None else (a, b, e):
        if tensor.dtype not in DTYPES:
            raise BrokenFile(
                tensor.path, "wrong-dtype", f"{tensor.name} is {tensor.dtype}; supported: {', '.join(DTYPES)}"
            )
        if len(tensor.shape) != 2:
            raise BrokenFile(
                tensor.path,
                "not-a-matrix",
                f"{tensor.name} has shape {list(tensor.shape)}; expected two sizes",
            )
    rank = a.shape[0]
    if b.shape[1] != rank or (e is not None and e.shape != (rank, 1)):
        raise BrokenFile(
            path,
            "rank-mismatch",
            f"module {name}: lora_A {list(a.shape)} does not fit lora_B {list(b.shape)}",
        )
    expected = config.rank(name)
    if rank != expected:
        raise BrokenFile(
            path, "config-rank-mismatch", f"module {name} has rank {rank}, {CONFIG_NAME} says {expected}"
        )
    if rank == 0:
        return None
    if not a.shape[1] or not b.shape[0]:
        raise BrokenFile(path, "empty-tensor", f"module {name} has a factor without elements")
    if not config.selects(name):
        raise BrokenFile(
            path, "not-a-target", f"module {name} is not in target_modules: PEFT would drop its weights"
        )
    scale = config.scale(name, rank)
    if "ranknum" in found:
        scale *= (config.r + 1e-5) / (_number(found["ranknum"]) + 1e-5)
    return LoraModule(canonical_name(name), rank, scale, a, b, e)


def _number(tensor: TensorInfo) -> float:
    """AdaLoRA's rank before it was cut, the divisor of its scale, where an older PEFT saved it."""
    value = (
        float(_load(tensor).float().sum()) if tensor.dtype in DTYPES and math.prod(tensor.shape) == 1 else 0.0
    )
    if not 1 <= value <= MAX_RANK:
        raise BrokenFile(
            tensor.path, "bad-ranknum", f"tensor {tensor.name!r} must be one number from 1 to {MAX_RANK}"
        )
    return value


def _load(tensor: TensorInfo) -> "Tensor":
    data = tensor.read()
    check_finite(tensor, data)
    return as_tensor(data, tensor.dtype, tensor.shape)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts layers.2 before layers.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
