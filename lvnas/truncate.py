"""Ranks cut by singular value decomposition of each update, with the error that it costs.

The update s B A of a module has at most R singular values; two QR factorisations reduce it to an R x R core, so that
nothing of the base's size is formed. Keeping the k largest is the best rank-k approximation (Eckart-Young); its
relative error in the Frobenius norm is sqrt(sum of the dropped squares / sum of all squares).
Shape letters: D input features, O output features, R rank.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lvnas.errors import InputError
from lvnas.lora_modules import Factored

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Truncated:
    """The module `source` at a lower rank; its scale is multiplied in, spread evenly over A and B."""

    source: Factored
    rank: int
    scale: float = 1.0

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def in_features(self) -> int:
        return self.source.in_features

    @property
    def out_features(self) -> int:
        return self.source.out_features

    def factors(self) -> "tuple[Tensor, Tensor]":
        """A_RD and B_OR of the best approximation, in the source's element type."""
        u_OR, s_R, vh_RD = decompose(self.source)
        dtype = self.source.factors()[0].dtype
        root = s_R[: self.rank].sqrt()
        return (root[:, None] * vh_RD[: self.rank]).to(dtype), (u_OR[:, : self.rank] * root).to(dtype)


def decompose(module: Factored) -> "tuple[Tensor, Tensor, Tensor]":
    """U_OR, S_R (descending) and V^T_RD of the module's update, float32."""
    import torch

    a_RD, b_OR = (factor.float() for factor in module.factors())
    q_b, r_b = torch.linalg.qr(b_OR)
    q_a, r_a = torch.linalg.qr(a_RD.T)
    u, s, vh = torch.linalg.svd(module.scale * r_b @ r_a.T, full_matrices=False)
    return q_b @ u, s, vh @ q_a.T


def singular_values(module: Factored) -> list[float]:
    """The singular values of the module's update, largest first."""
    import torch

    a_RD, b_OR = (factor.double() for factor in module.factors())
    core = torch.linalg.qr(b_OR).R @ torch.linalg.qr(a_RD.T).R.T
    return (abs(module.scale) * torch.linalg.svdvals(core)).tolist()


def cut_to_rank(spectra: Mapping[str, list[float]], rank: int) -> dict[str, int]:
    """Every rank at most `rank`."""
    if rank < 1:
        raise InputError(f"max rank {rank} must be at least 1")
    return {name: min(rank, len(values)) for name, values in spectra.items()}


def cut_to_energy(spectra: Mapping[str, list[float]], energy: float) -> dict[str, int]:
    """For each module the lowest rank that keeps the share `energy` of the sum of squared singular values."""
    if not 0 < energy <= 1:
        raise InputError(f"energy {energy} must be above 0 and at most 1, such as 0.99")
    ranks = {}
    for name, values in spectra.items():
        wanted, kept, rank = energy * sum(v * v for v in values), 0.0, 0
        while rank < len(values) and (rank == 0 or kept < wanted * (1 - 1e-12)):
            kept += values[rank] ** 2
            rank += 1
        ranks[name] = rank
    return ranks


def cut_to_parameters(
    spectra: Mapping[str, list[float]], widths: Mapping[str, int], parameters: int
) -> dict[str, int]:
    """The ranks that keep most energy per parameter, at most `parameters` in all, at least 1 each.

    Args:
        widths: module -> in + out, the parameters of one rank.

    Raises:
        InputError: even rank 1 everywhere is more than `parameters`.
    """
    left = parameters - sum(widths.values())
    if left < 0:
        raise InputError(
            f"{parameters:,} parameters are too few: rank 1 everywhere has {sum(widths.values()):,}"
        )
    ranks = dict.fromkeys(spectra, 1)
    gains = [
        (-(values[i] ** 2) / widths[name], name, i)
        for name, values in spectra.items()
        for i in range(1, len(values))
    ]
    for _, name, index in sorted(gains):
        if (
            ranks[name] == index and widths[name] <= left
        ):  # values fall: a module's next one is never passed over
            ranks[name] += 1
            left -= widths[name]
    return ranks


def relative_error(values: list[float], rank: int) -> float:
    """Frobenius norm of what rank `rank` drops over that of the whole update."""
    whole = sum(value * value for value in values)
    return math.sqrt(sum(value * value for value in values[rank:]) / whole) if whole else 0.0
