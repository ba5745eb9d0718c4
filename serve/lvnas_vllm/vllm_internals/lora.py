"""Any model's LoRA in vLLM: the CPU's operators, and the check that adapters meet their own tokens."""

import torch


def fix_cpu_lora() -> None:
    """Lets LoRA run on the CPU with quantised layers, with operators that leave rows without an adapter alone.

    vLLM's operators take index -1, "no adapter", as the last adapter slot (vLLM pull requests 48421 and 49656), and
    gather one copy of the weights per token: 2 GB of temporaries for one real-size image at rank 16.
    """
    from vllm.lora.layers import base_linear
    from vllm.lora.ops import torch_ops
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu
    from vllm.platforms import current_platform

    from lvnas_vllm import cpu_lora

    for name in ("bgmv_shrink", "bgmv_expand", "bgmv_expand_slice"):
        for module in (lora_ops, torch_ops, punica_cpu):
            setattr(module, name, getattr(cpu_lora, name))
    if current_platform.is_cpu():
        # vLLM asks the layer's weight, which int8 layers give up once it is packed.
        base_linear._get_lora_device = lambda base_layer: torch.device("cpu")


def check_lora_tokens(layer: torch.nn.Module, tokens: int) -> None:
    """Asserts that the adapters of exactly `tokens` tokens were mapped for `layer`, where it has LoRA.

    The GPU's kernels do not check it: a wrong count would give tokens to another request's adapter.
    """
    wrapper = getattr(layer, "punica_wrapper", None)
    mapped = wrapper.indices_len[0] if wrapper is not None else None
    assert mapped is None or mapped == tokens, f"LoRA mapping of {mapped} tokens for {tokens} tokens"
