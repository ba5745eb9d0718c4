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

    from lvnas_vllm import ragged
    from lvnas_vllm.vllm_internals import lora, mllama

    mllama.register_mllama()
    mllama.fix_encoder_order()
    lora.fix_cpu_lora()
    mllama.reject_stray_images()
    mllama.group_image_ids()
    mllama.count_image_tokens()
    ragged.enable()
