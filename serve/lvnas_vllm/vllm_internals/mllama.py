"""Llama-3.2-Vision in vLLM: its registration, and what the engine and the API assume about images."""

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
