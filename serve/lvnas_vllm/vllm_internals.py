"""Every touch of a name that vLLM does not promise to keep; test_vllm_internals.py guards each."""

import torch

ARCHITECTURE = "MllamaForConditionalGeneration"


def register_mllama() -> None:
    """Adds the model, its config class and its engine hook to vLLM's registries."""
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    from lvnas_vllm.mllama_config import MllamaEngineConfig, MllamaServingConfig

    _CONFIG_REGISTRY["mllama"] = MllamaServingConfig
    MODELS_CONFIG_MAP[ARCHITECTURE] = MllamaEngineConfig
    ModelRegistry.register_model(ARCHITECTURE, f"lvnas_vllm.mllama:{ARCHITECTURE}")


def check_version() -> None:
    """Raises ValueError where this vLLM lacks what the model cannot do without (0.25 does, 0.32 and 0.33 do not)."""
    import vllm
    from vllm.model_executor.models.interfaces import SupportsMultiModal
    from vllm.multimodal.processing import BaseMultiModalProcessor

    needed = (
        (SupportsMultiModal, "get_mm_lora_token_counts"),
        (BaseMultiModalProcessor, "_postprocess_hf_mm_data"),
    )
    if missing := [f"{owner.__name__}.{name}" for owner, name in needed if not hasattr(owner, name)]:
        raise ValueError(
            f"Llama-3.2-Vision needs vLLM 0.32 or 0.33; {vllm.__version__} has no {', '.join(missing)}"
        )


def fix_encoder_order() -> None:
    """Encodes images in batch order.

    The V1 runner encodes in the scheduler's order, while cross-attention fills the cache in batch order. They
    differ when one step resumes a preempted request and starts a new one: requests then see each other's
    images.
    """
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    original = GPUModelRunner._batch_mm_inputs_from_scheduler
    if getattr(original, "in_batch_order", False):
        return

    def _batch_mm_inputs_from_scheduler(self, scheduler_output):  # type: ignore[no-untyped-def]
        if self.model_config.is_encoder_decoder:
            index = self.input_batch.req_id_to_index
            inputs = scheduler_output.scheduled_encoder_inputs
            scheduler_output.scheduled_encoder_inputs = dict(
                sorted(inputs.items(), key=lambda x: index[x[0]])
            )
        return original(self, scheduler_output)

    _batch_mm_inputs_from_scheduler.in_batch_order = True  # type: ignore[attr-defined]
    GPUModelRunner._batch_mm_inputs_from_scheduler = _batch_mm_inputs_from_scheduler


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


def reject_stray_images() -> None:
    """Refuses a literal image token in a prompt without images, as transformers' processor does.

    Such prompts do not pass the multimodal processor, and the embedding's extra rows would serve the token.
    """
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.input_processor import InputProcessor

    original = InputProcessor._validate_model_inputs
    if getattr(original, "rejects_stray_images", False):
        return

    def _validate_model_inputs(self, encoder_input, decoder_input):  # type: ignore[no-untyped-def]
        config = self.model_config.hf_config
        tokens = decoder_input.get("prompt_token_ids") or ()
        text_only = config.model_type == "mllama" and decoder_input["type"] == "token"
        if text_only and config.image_token_index in tokens:
            raise VLLMValidationError("The prompt has an image token but no image.", parameter="image")
        return original(self, encoder_input, decoder_input)

    _validate_model_inputs.rejects_stray_images = True  # type: ignore[attr-defined]
    InputProcessor._validate_model_inputs = _validate_model_inputs


def group_image_ids() -> None:
    """Lets the images of a request, one item here, come with an identifier each, as the API sends them."""
    from vllm.renderers.base import BaseRenderer

    original = BaseRenderer._process_mm_uuids
    if getattr(original, "groups_images", False):
        return

    def _process_mm_uuids(self, mm_data, mm_data_items, mm_uuid_items, mm_req_id):  # type: ignore[no-untyped-def]
        ids = mm_uuid_items.get("image")
        if self.model_config.hf_config.model_type == "mllama" and ids is not None and len(ids) > 1:
            joined = None if None in ids else "+".join(ids)
            mm_uuid_items = {**mm_uuid_items, "image": [joined]}
        return original(self, mm_data, mm_data_items, mm_uuid_items, mm_req_id)

    _process_mm_uuids.groups_images = True  # type: ignore[attr-defined]
    BaseRenderer._process_mm_uuids = _process_mm_uuids


def count_image_tokens() -> None:
    """Counts image tokens in the usage of an answer; the V1 engine forgets the encoder's prompt."""
    from vllm.v1.engine.output_processor import RequestState

    start, finish = RequestState.from_new_request.__func__, RequestState._new_request_output
    if getattr(finish, "counts_image_tokens", False):
        return

    def from_new_request(cls, *args, request, **kwargs):  # type: ignore[no-untyped-def]
        state = start(cls, *args, request=request, **kwargs)
        counts = [item.data["image_tokens"].data for item in request.mm_features or () if _counted(item)]
        state.image_tokens = sum(int(count.sum()) for count in counts)
        return state

    def _new_request_output(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        output = finish(self, *args, **kwargs)
        if tokens := getattr(self, "image_tokens", 0):
            output.encoder_prompt_token_ids = [0] * tokens
        return output

    _new_request_output.counts_image_tokens = True  # type: ignore[attr-defined]
    RequestState.from_new_request = classmethod(from_new_request)
    RequestState._new_request_output = _new_request_output


def _counted(item) -> bool:  # type: ignore[no-untyped-def]
    return item.data is not None and "image_tokens" in item.data


# Ragged LoRA. Names that lvnas_vllm.ragged overrides or reads, with their parameters: a vLLM that changed one
# is refused at start instead of failing inside a step.
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
