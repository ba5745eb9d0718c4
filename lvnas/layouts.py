"""The three ways a pack lays an adapter out, as PEFT configuration and tensors.

`pad` and `group`: every module at one legal rank, filled up with zeros, scale multiplied into B, so that
every vLLM (old ones ignore `rank_pattern` and `alpha_pattern`) and PEFT compute the same. `ragged`: every
module at its own rank, values and scale as they were.
Shape letters: D input features, O output features, R rank.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lvnas.errors import InputError
from lvnas.lora_modules import Factored
from lvnas.modules import rank_pattern_key
from lvnas.tensorfile import Planned
from lvnas.values import as_bytes, one_thread, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

LAYOUTS = ("pad", "group", "ragged")
LEGAL_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""vLLM's choices for max_lora_rank (vllm/config/lora.py: MaxLoRARanks)."""


def legal_rank(rank: int) -> int:
    """The smallest rank that vLLM can be started with and that holds `rank`: 4 occupies 8.

    Raises:
        InputError: `rank` is above vLLM's highest.
    """
    for legal in LEGAL_RANKS:
        if legal >= rank:
            return legal
    raise InputError(f"rank {rank} is above {LEGAL_RANKS[-1]}, vLLM's highest; reduce it with --max-rank")


@dataclass(frozen=True, slots=True)
class Layout:
    """How a set of modules is written."""

    padded: bool
    modules: Mapping[str, Factored]
    dtype: str

    @property
    def max_rank(self) -> int:
        """The engine's max_lora_rank for this adapter."""
        return legal_rank(max(module.rank for module in self.modules.values()))

    def rank(self, module: Factored) -> int:
        """Rank that `module` has in the file."""
        return self.max_rank if self.padded else module.rank

    def tensors(self) -> list[Planned]:
        """What the file holds, in order."""
        planned = []
        for name, module in self.modules.items():
            rank = self.rank(module)
            prefix = f"base_model.model.{name}"
            planned.append(Planned(f"{prefix}.lora_A.weight", self.dtype, (rank, module.in_features)))
            planned.append(Planned(f"{prefix}.lora_B.weight", self.dtype, (module.out_features, rank)))
        return planned

    def data(self) -> Iterator[memoryview]:
        """The bytes of each of `tensors()` in turn.

        Raises:
            InputError: a value of the source is not finite, or is too large for the element type.
        """
        dtype, max_rank = torch_dtype(self.dtype), self.max_rank
        for module in self.modules.values():
            yield from self._module_data(module, dtype, max_rank)

    def _module_data(self, module: Factored, dtype: Any, max_rank: int) -> list[memoryview]:
        with one_thread():
            a_RD, b_OR = module.factors()
            scale = module.scale if self.padded else 1.0
            a_RD, b_OR = _cast(a_RD, 1.0, dtype, module.name), _cast(b_OR, scale, dtype, module.name)
            if self.padded and module.rank < max_rank:
                a_RD = _padded(a_RD, (max_rank, module.in_features))
                b_OR = _padded(b_OR, (module.out_features, max_rank))
            return [as_bytes(a_RD), as_bytes(b_OR)]

    def config(self, **facts: Any) -> dict[str, Any]:
        """adapter_config.json: `facts` (base, task type) and all that decides the arithmetic."""
        rank = self.max_rank if self.padded else max(module.rank for module in self.modules.values())
        pattern: dict[str, dict[str, Any]] = {"rank_pattern": {}, "alpha_pattern": {}}
        if not self.padded:
            for name, module in self.modules.items():
                pattern["rank_pattern"][rank_pattern_key(name)] = module.rank
                pattern["alpha_pattern"][rank_pattern_key(name)] = _tidy(module.scale * module.rank)
        return {
            "peft_type": "LORA",
            **facts,
            "r": rank,
            "lora_alpha": rank,
            **pattern,
            "target_modules": list(self.modules),
            "bias": "none",
            "inference_mode": True,
            "init_lora_weights": True,
            "lora_dropout": 0.0,
            "modules_to_save": None,
            "use_dora": False,
            "use_rslora": False,
        }

    def scaling(self) -> dict[str, Any]:
        """The scale that remains beside the tensors, as the manifest states it."""
        if self.padded:
            return {"convention": "folded", "scale": 1.0}
        scales = {_tidy(module.scale) for module in self.modules.values()}
        if len(scales) == 1:
            return {"convention": "constant", "scale": scales.pop()}
        return {"convention": "per-module", "scale": {n: _tidy(m.scale) for n, m in self.modules.items()}}


def _cast(tensor: "Tensor", scale: float, dtype: Any, module: str) -> "Tensor":
    """`scale * tensor`, rounded once, as `dtype`; a value that is not finite can only be a finite one's overflow."""
    if scale == 1.0 and tensor.dtype == dtype:
        return tensor
    # In its own type torch multiplies in float32 and rounds once: the same bits as by way of float32, without the copy.
    cast = tensor * scale if tensor.dtype == dtype else (tensor.float() * scale).to(dtype)
    if cast.numel() and not all(extreme.isfinite() for extreme in cast.aminmax()):  # a NaN is both extremes
        kind = str(dtype).removeprefix("torch.")
        raise InputError(
            f"{module}: values up to {float(tensor.abs().max()) * scale:.3g} do not fit {kind}; use --dtype float32"
        )
    return cast


def _padded(tensor: "Tensor", shape: tuple[int, int]) -> "Tensor":
    filled = tensor.new_zeros(shape)
    filled[: tensor.shape[0], : tensor.shape[1]] = tensor
    return filled


def _tidy(number: float) -> float | int:
    """Alpha = scale * rank without the last digit's rounding error: 16 rather than 15.999999999999998."""
    return round(number) if abs(number - round(number)) < 1e-9 else number
