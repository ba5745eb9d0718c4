"""Each private name of vLLM that the Mllama plugin touches is where it was, with the parameters it had.

The sources are read, not imported, so that other versions can be checked too: unpack a wheel and name its folder
(that holds `vllm/`) in LVNAS_VLLM_SOURCES, several separated by colons. One older than 0.32 must be refused.
"""

import ast
import functools
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

INSTALLED = Path(importlib.util.find_spec("vllm").origin).parent.parent
SOURCES = [Path(folder) for folder in os.environ.get("LVNAS_VLLM_SOURCES", "").split(":") if folder]


def minor(root: Path) -> int:
    """The second number of the version in `root`."""
    return int(re.search(r"__version__ = version = '0\.(\d+)", (root / "vllm/_version.py").read_text())[1])


OTHERS = [root for root in SOURCES if minor(root) >= 32]
OLD = [root for root in SOURCES if minor(root) < 32]

FUNCTIONS = {
    # fix_encoder_order
    "v1/worker/gpu_model_runner:GPUModelRunner._batch_mm_inputs_from_scheduler": "scheduler_output",
    # fix_cpu_lora
    **{
        f"lora/ops/torch_ops/lora_ops:{name}": f"inputs lora_b_weights output_tensor lora_indices_tensor {last}"
        for name, last in {
            "bgmv_shrink": "scaling",
            "bgmv_expand": "add_inputs",
            "bgmv_expand_slice": "slice_offset slice_size add_inputs",
        }.items()
    },
    "lora/layers/utils:_get_lora_device": "base_layer",
    # MllamaEncoderBudget
    "v1/core/encoder_cache_manager:EncoderCacheManager.create_manager": "cache_size vllm_config",
    "v1/core/encoder_cache_manager:EncoderDecoderCacheManager.__init__": "cache_size",
    "v1/core/encoder_cache_manager:EncoderDecoderCacheManager.can_allocate": (
        "request input_id encoder_compute_budget num_embeds_to_schedule"
    ),
    "v1/core/encoder_cache_manager:EncoderDecoderCacheManager.allocate": "request input_id",
    "v1/core/encoder_cache_manager:EncoderDecoderCacheManager.free_encoder_input": "request input_id",
    "v1/core/encoder_cache_manager:EncoderDecoderCacheManager.reset": "",
    # reject_stray_images, group_image_ids, count_image_tokens
    "v1/engine/input_processor:InputProcessor._validate_model_inputs": "encoder_input decoder_input",
    "renderers/base:BaseRenderer._process_mm_uuids": "mm_data mm_data_items mm_uuid_items mm_req_id",
    "v1/engine/output_processor:RequestState.from_new_request": (
        "tokenizer request prompt parent_req request_index queue log_stats stream_interval"
    ),
    "v1/engine/output_processor:RequestState._new_request_output": (
        "external_req_id outputs finished kv_transfer_params ec_transfer_params error"
    ),
    # mllama_processor
    "multimodal/parse:MultiModalDataParser._parse_image_data": "data",
    "multimodal/processing/context:BaseProcessingInfo.parse_mm_data": "mm_data validate",
    "multimodal/processing/context:BaseProcessingInfo.get_mm_max_tokens_per_item": "seq_len mm_counts",
    "multimodal/processing/dummy_inputs:BaseDummyInputsBuilder.get_dummy_mm_data": "seq_len mm_counts mm_options",
    "multimodal/processing/processor:EncDecMultiModalProcessor.apply": "inputs timing_ctx",
    "multimodal/processing/processor:EncDecMultiModalProcessor.create_encoder_prompt": "prompt mm_items",
    "multimodal/processing/processor:BaseMultiModalProcessor._get_mm_fields_config": (
        "hf_inputs hf_processor_mm_kwargs"
    ),
    "multimodal/processing/processor:BaseMultiModalProcessor._postprocess_hf_mm_data": (
        "mm_inputs hf_processor_mm_kwargs processed_data"
    ),
    "multimodal/processing/processor:BaseMultiModalProcessor._get_prompt_updates": (
        "mm_items hf_processor_mm_kwargs out_mm_kwargs"
    ),
    # mllama, mllama_text
    "model_executor/models/interfaces:SupportsMultiModal.get_mm_lora_token_counts": (
        "modality mm_kwargs num_mm_embeds"
    ),
    "model_executor/models/llama:LlamaDecoderLayer.__init__": "vllm_config prefix config attn_layer_type",
    "model_executor/models/llama:LlamaDecoderLayer.forward": "positions hidden_states residual",
    "model_executor/layers/attention/cross_attention:CrossAttention.__init__": (
        "num_heads head_size scale cache_config attn_type"
    ),
    # mllama_state
    "v1/worker/gpu/model_states/encoder_decoder:EncoderDecoderModelState.prepare_inputs_embeds": (
        "scheduled_encoder_inputs input_batch req_states"
    ),
    "v1/worker/gpu/model_states/encoder_decoder:EncoderDecoderModelState.prepare_inputs": "input_batch req_states",
    "v1/worker/gpu/mm/encoder_runner:EncoderRunner.prepare_mm_inputs": "scheduled_encoder_inputs",
    "v1/worker/gpu/mm/encoder_runner:EncoderRunner.execute_mm_encoder": "mm_kwargs",
    "v1/worker/gpu/mm/encoder_runner:EncoderRunner.timed_encoder_operation": "request_ids",
}
METADATA = "query_start_loc: torch.Tensor\n    max_seq_len: int\n    seq_lens: torch.Tensor"
TEXTS = {
    "transformers_utils/config": "_CONFIG_REGISTRY: dict[str, type[PreTrainedConfig]] = LazyConfigDict(",
    "model_executor/models/config": "MODELS_CONFIG_MAP: dict[str, type[VerifyAndUpdateConfig]] = {",
    "lora/punica_wrapper/punica_base": "self.indices_len: list[int | None]",
    "lora/layers/base_linear": "self.device = _get_lora_device(self.base_layer)",
    "v1/core/sched/scheduler": "vllm_config.ec_manager_config.get_encoder_cache_manager_obj()",
    "v1/attention/backends/cpu_attn": METADATA,
    "v1/attention/backends/flash_attn": METADATA,
    "v1/attention/backends/triton_attn": METADATA,
    "entrypoints/openai/chat_completion/serving": "if final_res.encoder_prompt_token_ids is not None:",
    "v1/worker/gpu/model_states/__init__": 'if hasattr(model, "get_model_state_cls"):',
}
SETTINGS = (
    ("config/scheduler", ("max_num_batched_tokens", "max_num_encoder_input_tokens", "encoder_cache_size")),
    ("config/lora", ("enable_tower_connector_lora",)),
    ("config/multimodal", ("limit_per_prompt",)),
    ("config/cache", ("enable_prefix_caching",)),
    ("config/compilation", ("mode",)),
    ("config/ec_manager_config", ("encoder_cache_manager_cls",)),
)


@functools.cache
def tree(root: Path, module: str) -> ast.Module:
    return ast.parse((root / "vllm" / f"{module}.py").read_text())


def parameters(root: Path, name: str) -> str:
    """The parameters of the function `path/of/module:Class.method` after self or cls, names only."""
    module, _, path = name.partition(":")
    node: ast.AST = tree(root, module)
    for part in path.split("."):
        node = next(
            child
            for child in ast.iter_child_nodes(node)
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and child.name == part
        )
    args = node.args
    names = [arg.arg for arg in (*args.posonlyargs, *args.args, *args.kwonlyargs)]
    return " ".join(name for name in names if name not in ("self", "cls"))


@pytest.mark.parametrize("root", [INSTALLED, *OTHERS], ids=lambda root: root.name)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_is_there_with_its_parameters(root: Path, name: str) -> None:
    assert parameters(root, name) == FUNCTIONS[name]


@pytest.mark.parametrize("root", [INSTALLED, *OTHERS], ids=lambda root: root.name)
@pytest.mark.parametrize("module", TEXTS)
def test_source_says_what_is_relied_on(root: Path, module: str) -> None:
    assert TEXTS[module] in (root / "vllm" / f"{module}.py").read_text()


@pytest.mark.parametrize("root", [INSTALLED, *OTHERS], ids=lambda root: root.name)
@pytest.mark.parametrize(("module", "names"), SETTINGS)
def test_setting_exists(root: Path, module: str, names: tuple[str, ...]) -> None:
    fields = {
        statement.target.id
        for node in ast.walk(tree(root, module))
        if isinstance(node, ast.ClassDef)
        for statement in node.body
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
    }
    assert set(names) <= fields


@pytest.mark.parametrize("root", OLD, ids=lambda root: root.name)
@pytest.mark.parametrize(
    ("code", "wanted"),
    [
        (
            "from lvnas_vllm.vllm_internals.mllama import check_version; check_version()",
            "ValueError: Llama-3.2-Vision needs vLLM 0.32 or 0.33; .* has no "
            "SupportsMultiModal.get_mm_lora_token_counts, BaseMultiModalProcessor._postprocess_hf_mm_data",
        ),
        (
            "from lvnas_vllm.vllm_internals.ragged import install_ragged; install_ragged()",
            "InputError: LVNAS_RAGGED=1 does not know vLLM .*ClassificationHeadWithLoRA.* changed; install vllm",
        ),
        ("import lvnas_vllm; lvnas_vllm.register(); raise SystemExit('registered')", "registered"),
    ],
    ids=["model", "ragged", "plugin"],
)
def test_an_older_version_is_refused_with_the_names_it_lacks(root: Path, code: str, wanted: str) -> None:
    """The plugin itself loads: vLLM's other models are served as ever."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert re.search(wanted, done.stderr.splitlines()[-1]), done.stderr[-2000:]
