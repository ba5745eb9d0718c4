"""The gate-vector supernetwork: LoRA at the highest rank of a space, one gate per rank dimension.

Legend: T tokens, D input, O output, R highest rank, K ranks in the space, N modules.

The paper's superweight of one module (LangVision-LoRA-NAS, arXiv 2508.12512) adds up zero-padded slices of
the highest-rank LoRA, A_super = sum_k p_k A[slice_k], B_super = sum_k p_k B[:, slice_k], p = softmax(alpha).
The slices are nested, so with m_j = the sum of p_k over the slices that contain dimension j this is

    s * B_super A_super x = s * B (m * m * (A x))

one vector multiply on `A x`, with no copies of A and B. Any gate vector g [R] can take the place of m * m.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lvnas.errors import InputError
from lvnas.modules import find_targets

ADAPTER = "default"


def check_space(ranks: Iterable[int]) -> list[int]:
    """The ranks of a search space, ascending.

    Raises:
        InputError: fewer than two ranks, a negative one, one that occurs twice, or no rank above 0.
    """
    ranks = sorted(ranks)
    if len(ranks) < 2 or ranks[0] < 0 or len(set(ranks)) != len(ranks):
        raise InputError(
            f"ranks {','.join(map(str, ranks)) or '(none)'}: need two or more different whole numbers >= 0"
        )
    return ranks


def slice_masks(ranks: Sequence[int], *, centred: bool) -> Tensor:
    """[K, R] of 0 and 1: which of the R dimensions the slice of each rank holds; slices are nested.

    `centred` is the paper's choice: rank r takes r dimensions around the middle; otherwise the leading r. The
    two differ by a permutation of the dimensions.
    """
    highest = max(ranks)
    masks = torch.zeros(len(ranks), highest)
    for k, rank in enumerate(ranks):
        start = (highest - rank) // 2 if centred else 0
        masks[k, start : start + rank] = 1
    return masks


def superweight_gates(alpha: Tensor, masks: Tensor) -> Tensor:
    """The paper's gates m * m, [N, R], of alpha [N, K] and masks [K, R]; differentiable in alpha."""
    m = torch.softmax(alpha, dim=-1) @ masks.to(alpha)
    return m * m


class Supernet:
    """A model with PEFT LoRA layers at the highest rank of a space, each with a gate vector on `A x`.

    The gates are leaf tensors, one [R] per module: gradient checkpointing recomputes through them, and their
    gradients are read out after `backward`. They start at 1, which is plain LoRA, and at the cost of plain LoRA
    while `watch_gates(False)`: nobody then needs `A x` twice.

    Args:
        model: any model that PEFT can put LoRA on; quantised and half-precision bases too. Changed in place
            until `close`.
        targets: see `lvnas.modules.find_targets`.
        ranks: the space.
        scale: the constant LoRA scaling s.

    Raises:
        InputError: a bad space, no matching modules, or a model that already has an adapter.
    """

    def __init__(
        self, model: nn.Module, targets: str | Iterable[str], ranks: Iterable[int], *, scale: float = 1.0
    ) -> None:
        self.ranks = check_space(ranks)
        if any(isinstance(module, LoraLayer) for module in model.modules()):
            raise InputError("the model already has LoRA layers; pass the base model, without an adapter")
        self.scale = scale
        linears = find_targets(model, targets)
        self.shapes = {name: (layer.in_features, layer.out_features) for name, layer in linears.items()}
        highest = max(self.ranks)
        config = LoraConfig(
            r=highest,
            lora_alpha=scale * highest,  # type: ignore[arg-type]  # PEFT takes fractions too
            target_modules=list(self.shapes),
            bias="none",
        )
        self.peft: Any = get_peft_model(model, config)
        self.layers: dict[str, Any] = {name: model.get_submodule(name) for name in self.shapes}
        self.gates: dict[str, Tensor] = {}
        self._ones = True
        self._hooks = []
        for name, layer in self.layers.items():
            gate = torch.ones(highest, device=layer.lora_A[ADAPTER].weight.device, requires_grad=True)
            self.gates[name] = gate
            self._hooks.append(layer.lora_A[ADAPTER].register_forward_hook(self._multiply_by(gate)))

    def loss(self, inputs: Mapping[str, Any]) -> Tensor:
        """The model's own mean loss on one batch."""
        return self.peft(**inputs).loss

    def weights(self) -> list[nn.Parameter]:
        """A and B of every module, in the order of the modules."""
        return [matrix for name in self.shapes for matrix in self.matrices(name)]

    def matrices(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """A [R, D] and B [O, R] of a module."""
        layer = self.layers[name]
        return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight

    def watch_gates(self, watch: bool) -> None:
        """Whether backward passes leave gradients in the gates; at first they do."""
        for gate in self.gates.values():
            gate.requires_grad_(watch)

    def set_gates(self, values: Tensor) -> None:
        """Sets every module's gates from values [N, R]."""
        self._ones = bool((values == 1).all())
        with torch.no_grad():
            for gate, value in zip(self.gates.values(), values, strict=True):
                gate.copy_(value)

    def take_gate_gradients(self) -> Tensor:
        """dL/dg [N, R] of the last backward pass, as float32 on the CPU; clears them.

        A module that the batch did not reach (a text-only batch and the vision tower) has gradient 0.
        """
        rows = [torch.zeros_like(gate) if gate.grad is None else gate.grad for gate in self.gates.values()]
        for gate in self.gates.values():
            gate.grad = None
        return torch.stack([row.float().cpu() for row in rows])

    def close(self) -> nn.Module:
        """Takes hooks and adapter off again and returns the base model."""
        for hook in self._hooks:
            hook.remove()
        return self.peft.unload()

    def _multiply_by(self, gate: Tensor) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            if self._ones and not gate.requires_grad:
                return output
            return output * gate.to(output.dtype)

        return hook


def factor(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The thin SVD of b [O, R] @ a [R, D] without forming the product: U [O, R], sigma [R], Vt [R, D].

    Where D or O is smaller than R, the missing directions are zero.
    """
    rank = a.shape[0]
    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    q_b, r_b = torch.linalg.qr(b.to(dtype))
    q_a, r_a = torch.linalg.qr(a.to(dtype).T)
    u, sigma, vt = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    missing = rank - sigma.numel()
    u = nn.functional.pad(q_b @ u, (0, missing))
    vt = nn.functional.pad(vt @ q_a.T, (0, 0, 0, missing))
    return u, nn.functional.pad(sigma, (0, missing)), vt
