"""PiSSA, OLoRA, CorDA and LoRA-GA adapters as plain LoRA for the untouched base.

They start from factors A0, B0 and subtract s B0 A0 from the base; trained, they fit only that changed base. On the
untouched one the same model is the update s B A - s B0 A0, a plain LoRA of twice the rank
(peft/tuners/lora/model.py: subtract_mutated_init). A0 and B0 come from the initial adapter, if it was saved, or are
computed again from the base where the method is exact (PiSSA: the largest singular values; OLoRA: QR).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lvnas.adapters import Adapter
from lvnas.base_weights import base_weights
from lvnas.errors import InputError
from lvnas.lora_modules import Factored
from lvnas.tensorfile import TensorInfo
from lvnas.values import as_tensor

if TYPE_CHECKING:
    from torch import Tensor

RECOMPUTED = ("pissa", "olora")


@dataclass(frozen=True, slots=True)
class Initial:
    """The factors that `method` starts from, for a module of rank and scale as `trained`."""

    trained: Factored
    weight: TensorInfo
    method: str
    transposed: bool

    @property
    def scale(self) -> float:
        return self.trained.scale

    @property
    def rank(self) -> int:
        return self.trained.rank

    def factors(self) -> "tuple[Tensor, Tensor]":
        """A0 and B0 as PEFT makes them (peft/tuners/lora/layer.py: pissa_init, olora_init)."""
        import torch

        weight_OD = as_tensor(self.weight.read(), self.weight.dtype, self.weight.shape).float()
        if self.transposed:
            weight_OD = weight_OD.T
        if self.method == "olora":
            q, r = torch.linalg.qr(weight_OD)
            return r[: self.rank], q[:, : self.rank]
        u, s, vh = torch.linalg.svd(weight_OD, full_matrices=False)
        root = (s[: self.rank] / self.scale).sqrt()
        return root[:, None] * vh[: self.rank], u[:, : self.rank] * root


@dataclass(frozen=True, slots=True)
class Difference:
    """The update of `trained` less that of `initial`: one plain LoRA of both ranks together."""

    trained: Factored
    initial: "Factored | Initial"

    @property
    def name(self) -> str:
        return self.trained.name

    @property
    def rank(self) -> int:
        return self.trained.rank + self.initial.rank

    @property
    def scale(self) -> float:
        return self.trained.scale

    @property
    def in_features(self) -> int:
        return self.trained.in_features

    @property
    def out_features(self) -> int:
        return self.trained.out_features

    def factors(self) -> "tuple[Tensor, Tensor]":
        """[A; A0] and [B, -B0 s0 / s]."""
        import torch

        (a, b), (a0, b0) = self.trained.factors(), self.initial.factors()
        return torch.cat([a.float(), a0.float()]), torch.cat(
            [b.float(), b0.float() * (-self.initial.scale / self.scale)], 1
        )


def to_plain(adapter: Adapter, initial: Adapter | None, base_folder: Path | None) -> Mapping[str, Factored]:
    """The modules of `adapter` as plain LoRA.

    Args:
        initial: the adapter as it was before training (saved with init_lora_weights=true), if there is one.
        base_folder: the untouched base, to compute the initial factors from.

    Raises:
        InputError: neither helps; the message says what would.
    """
    method = adapter.config.changed_base
    if method is None:
        return adapter.modules
    if initial is not None:
        if initial.modules.keys() != adapter.modules.keys() or initial.config.changed_base:
            raise InputError(
                f"{initial.folder} is not the initial adapter of {adapter.name!r}: it must have the same modules and "
                "init_lora_weights=true"
            )
        return {name: Difference(module, initial.modules[name]) for name, module in adapter.modules.items()}
    if method not in RECOMPUTED or base_folder is None:
        ways = "give the adapter as saved before training with --initial-adapter"
        if method in RECOMPUTED:
            ways += ", or the base's folder with --base"
        raise InputError(
            f"adapter {adapter.name!r} was initialised with {method}, which changed the base; {ways}, or save it with "
            "PEFT's path_initial_model_for_weight_conversion"
        )
    weights = base_weights(base_folder)
    missing = [name for name in adapter.modules if name not in weights]
    if missing:
        raise InputError(
            f"base {base_folder} has no weight for {missing[0]}; it is not the base of {adapter.name!r}"
        )
    transposed = adapter.config.fan_in_fan_out
    return {
        name: Difference(module, Initial(module, weights[name], method, transposed))
        for name, module in adapter.modules.items()
    }
