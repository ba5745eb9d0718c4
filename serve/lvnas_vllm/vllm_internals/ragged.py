"""Where ragged LoRA takes the place of vLLM's own, and what it reads there."""

import torch

RAGGED_NAMES = {
    "vllm.lora.model_manager:LRUCacheLoRAModelManager.__init__": (
        *("model", "max_num_seqs", "max_num_batched_tokens", "vocab_size", "lora_config", "device"),
        "vllm_config",
    ),
    "vllm.lora.model_manager:LRUCacheLoRAModelManager._create_merged_loras_inplace": ("lora_model",),
    "vllm.lora.model_manager:LRUCacheLoRAModelManager._get_lora_layer_weights": ("lora_model", "module_name"),
    "vllm.lora.model_manager:LRUCacheLoRAModelManager._deactivate_adapter": ("lora_id",),
    "vllm.lora.model_manager:LRUCacheLoRAModelManager.deactivate_adapter": ("adapter_id",),
    "vllm.lora.model_manager:LRUCacheLoRAModelManager.activate_adapter": ("lora_id",),
    "vllm.lora.model_manager:LRUCacheLoRAModelManager.remove_adapter": ("adapter_id",),
    "vllm.lora.model_manager:LRUCacheLoRAModelManager.remove_all_adapters": (),
    "vllm.lora.model_manager:LRUCacheLoRAModelManager.create_dummy_lora": (
        *("lora_id", "rank", "embedding_modules"),
    ),
    "vllm.lora.model_manager:AdapterLRUCache.__init__": ("capacity", "deactivate_fn"),
    "vllm.lora.worker_manager:LRUCacheWorkerLoRAManager.add_adapter": ("lora_request",),
    "vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA._apply_lora_to_output": ("x", "output"),
    "vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA.create_lora_weights": (
        *("max_loras", "lora_config", "model_config"),
    ),
    "vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA.set_lora": ("index", "lora_a", "lora_b"),
    "vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA.reset_lora": ("index",),
    "vllm.lora.layers:MergedColumnParallelLinearWithLoRA.expand_packed_lora": ("lora_a", "lora_b"),
    "vllm.lora.layers:ClassificationHeadWithLoRA.create_lora_weights": (
        *("max_loras", "lora_config", "model_config"),
    ),
    "vllm.lora.layers:LogitsProcessorWithLoRA.create_lora_weights": (
        *("max_loras", "lora_config", "model_config"),
    ),
    "vllm.lora.punica_wrapper.punica_base:PunicaWrapperBase.update_metadata": (
        *("mapping", "lora_index_to_id", "max_loras", "vocab_size", "kwargs"),
    ),
    "vllm.lora.punica_wrapper.punica_cpu:PunicaWrapperCPU.add_lora_logits": (
        *("y", "x", "lora_a_stacked", "lora_b_stacked", "scale", "buffer", "kwargs"),
    ),
    "vllm.lora.utils:from_layer_logits_processor": (
        *("layer", "lm_head", "max_loras", "lora_config", "model_config"),
    ),
    "vllm.lora.utils:parse_fine_tuned_lora_name": ("name", "weights_mapper"),
    "vllm.v1.engine.core:EngineCore.add_request": ("request", "request_wave"),
    "vllm.v1.engine.core:EngineCore.remove_lora": ("lora_id",),
    "vllm.v1.engine.core_client:InprocClient.add_lora": ("lora_request",),
    "vllm.v1.engine.core:EngineCoreProc._send_error_outputs_to_client": ("req_ids", "client_index"),
}
"""Names that lvnas_vllm.ragged overrides or reads, with their parameters: a vLLM that changed one is refused at
start instead of failing inside a step."""


def changed_ragged_names() -> list[str]:
    """The names of `RAGGED_NAMES` that this vLLM does not have with these parameters."""
    import importlib
    import inspect

    changed = []
    for name, expected in RAGGED_NAMES.items():
        module, _, path = name.partition(":")
        found: object = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part, None)
        parameters = tuple(inspect.signature(found).parameters) if callable(found) else None
        if parameters is None or tuple(p for p in parameters if p != "self") != expected:
            changed.append(f"{name}{parameters or ''}")
    return changed


def install_ragged() -> None:
    """Puts the ragged layers, managers and punica wrapper in the places where vLLM looks its own up."""
    from lvnas.errors import InputError

    if changed := changed_ragged_names():
        import vllm

        raise InputError(
            f"LVNAS_RAGGED=1 does not know vLLM {vllm.__version__}: {'; '.join(changed)} changed; "
            "install vllm 0.32.0, or unset LVNAS_RAGGED"
        )
    from vllm.lora import utils
    from vllm.lora.layers import VocabParallelEmbeddingWithLoRA
    from vllm.platforms import current_platform
    from vllm.v1.worker import lora_model_runner_mixin

    from lvnas_vllm.ragged import layers, manager

    if lora_model_runner_mixin.LRUCacheWorkerLoRAManager is manager.RaggedWorkerManager:
        return
    wrappers = {
        "cpu": "lvnas_vllm.ragged.wrapper.RaggedWrapperCPU",
        "cuda": "lvnas_vllm.ragged.wrapper_gpu.RaggedWrapperGPU",
    }
    platform = current_platform.device_type
    if platform not in wrappers:
        raise InputError(f"LVNAS_RAGGED=1 on device {platform!r}; allowed: {', '.join(wrappers)}")
    utils._all_lora_classes = tuple(
        layers.ragged(layer)
        for layer in utils._all_lora_classes
        if layer is not VocabParallelEmbeddingWithLoRA
    )
    utils.LogitsProcessorWithLoRA = layers.ragged(utils.LogitsProcessorWithLoRA)
    lora_model_runner_mixin.LRUCacheWorkerLoRAManager = manager.RaggedWorkerManager
    type(current_platform).get_punica_wrapper = classmethod(lambda cls: wrappers[platform])
    _load_adapters_before_queueing()


def mark_compiled_code(elements: int) -> None:
    """Makes the arena's size part of the key of vLLM's compiled code, in which it is a static shape.

    Without it a server would load what another pack's server compiled, or one without ragged LoRA, and fail in its
    first step.
    """
    from vllm import envs

    envs.environment_variables["LVNAS_RAGGED_ELEMENTS"] = lambda: elements


def _load_adapters_before_queueing() -> None:
    """Loads a request's adapter before it is queued, so that a refusal answers it and never ends a step.

    A server's engine process answers with an error; `LLM.generate` raises, with nothing added yet.
    """
    import inspect

    from vllm.logger import init_logger
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.llm_engine import LLMEngine

    logger = init_logger("vllm.lvnas.ragged")
    core_add, core_remove, llm_add = EngineCore.add_request, EngineCore.remove_lora, LLMEngine.add_request
    parameters = inspect.signature(llm_add)

    def known_adapters(core) -> set[tuple[int, str]]:  # type: ignore[no-untyped-def]
        return core.__dict__.setdefault("_lvnas_known_adapters", set())

    def _core_add(self, request, request_wave=0):  # type: ignore[no-untyped-def]
        lora, known = request.lora_request, known_adapters(self)
        answers = hasattr(self, "_send_error_outputs_to_client")
        if answers and lora is not None and (lora.lora_int_id, lora.lora_path) not in known:
            try:
                self.model_executor.add_lora(lora)
            except Exception as error:
                logger.error("Request %s: %s", request.request_id, error)
                self._send_error_outputs_to_client([request.request_id], request.client_index)
                return
            known.add((lora.lora_int_id, lora.lora_path))
        core_add(self, request, request_wave)

    def _core_remove(self, lora_id):  # type: ignore[no-untyped-def]
        known = known_adapters(self)
        known.difference_update([key for key in known if key[0] == lora_id])
        return core_remove(self, lora_id)

    def _llm_add(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        lora = parameters.bind(self, *args, **kwargs).arguments.get("lora_request")
        core = getattr(self.engine_core, "engine_core", None)
        if core is not None and lora is not None:
            if (lora.lora_int_id, lora.lora_path) not in known_adapters(core):
                core.add_lora(lora)
            known_adapters(core).add((lora.lora_int_id, lora.lora_path))
        return llm_add(self, *args, **kwargs)

    EngineCore.add_request, EngineCore.remove_lora = _core_add, _core_remove
    LLMEngine.add_request = _llm_add


def refuse_unserved_lora_options(lora_config) -> None:  # type: ignore[no-untyped-def]
    """Raises InputError for LoRA options that the ragged layers do not serve."""
    from vllm import envs

    from lvnas.errors import InputError

    for option, on in {
        "--fully-sharded-loras": lora_config.fully_sharded_loras,
        "VLLM_LORA_ENABLE_DUAL_STREAM=1": envs.VLLM_LORA_ENABLE_DUAL_STREAM,
    }.items():
        if on:
            raise InputError(f"{option} does not go with LVNAS_RAGGED=1: drop one of the two")


def refuse_vocabulary_lora(lora_model, model: torch.nn.Module) -> None:  # type: ignore[no-untyped-def]
    """Raises ValueError for an adapter of the input embedding, which the ragged path does not serve."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    modules = dict(model.named_modules())
    for name in lora_model.loras:
        module = modules.get(name)
        if isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead):
            raise ValueError(
                f"adapter refused: it has LoRA on the input embedding {name}, which LVNAS_RAGGED=1 does not "
                "serve; train without it, or serve without LVNAS_RAGGED"
            )


def vllm_name(model: torch.nn.Module, name: str) -> str:
    """A checkpoint's module name as this vLLM model has it."""
    from vllm.lora.utils import parse_fine_tuned_lora_name

    mapper = getattr(model, "hf_to_vllm_mapper", None)
    mapper = mapper.get_rename_mapper() if mapper is not None else None
    return parse_fine_tuned_lora_name(f"base_model.model.{name}.lora_A.weight", mapper)[0]


def kv_bytes_per_token(vllm_config) -> int:  # type: ignore[no-untyped-def]
    """Bytes that one token takes in this process's KV cache, 0 without one."""
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    layers = get_layers_from_vllm_config(vllm_config, AttentionLayerBase).values()
    specs = [layer.get_kv_cache_spec(vllm_config) for layer in layers]
    return sum(spec.page_size_bytes // spec.block_size for spec in specs if spec is not None)
