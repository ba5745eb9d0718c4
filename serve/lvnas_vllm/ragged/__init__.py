"""Ragged-rank LoRA for every model that vLLM can put LoRA on: memory and work follow each module's own rank.

Switched on by LVNAS_RAGGED=1, which `lvnas serve` sets for ragged packs. See docs/ragged.md.
"""

import os

SWITCH = "LVNAS_RAGGED"


def enable() -> bool:
    """Installs the ragged managers, layers and operators in vLLM if $LVNAS_RAGGED is 1; safe to call again.

    Returns whether they are installed.

    Raises:
        InputError: $LVNAS_RAGGED is neither 0 nor 1, or this vLLM's internals are not the ones known.
    """
    from lvnas.errors import InputError

    value = os.environ.get(SWITCH, "0")
    if value not in ("0", "1"):
        raise InputError(f"{SWITCH}={value!r}; allowed: 0, 1")
    if value == "0":
        return False
    from lvnas_vllm.vllm_internals.ragged import install_ragged

    install_ragged()
    return True


def operator_path() -> str:
    """Which operators run ragged LoRA on this machine, in words, for `lvnas doctor`."""
    import torch

    if torch.cuda.is_available():
        return "Triton kernels"
    from lvnas_vllm.ragged import native

    return native.load().reason
