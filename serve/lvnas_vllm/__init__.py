"""Llama-3.2-Vision with LoRA everywhere, and ragged-rank LoRA, for an unmodified vLLM.

vLLM calls `register` in each of its processes through the entry point group `vllm.general_plugins`.
"""

_registered = False


def register() -> None:
    """Adds the model, its config and the corrections they need to vLLM. Cheap, and safe to call again."""
    global _registered
    if _registered:
        return
    _registered = True

    from lvnas_vllm import ragged, vllm_internals

    vllm_internals.register_mllama()
    vllm_internals.fix_encoder_order()
    vllm_internals.fix_cpu_lora()
    vllm_internals.reject_stray_images()
    vllm_internals.group_image_ids()
    vllm_internals.count_image_tokens()
    ragged.enable()
