"""Guards for every name of vLLM's that is not promised: each test names what broke."""

import inspect

import pytest
from lvnas_vllm import vllm_internals

from lvnas.errors import InputError

# Ragged LoRA


@pytest.mark.parametrize("name", vllm_internals.RAGGED_NAMES)
def test_ragged_names_have_these_parameters(name, monkeypatch):
    monkeypatch.setattr(vllm_internals, "RAGGED_NAMES", {name: vllm_internals.RAGGED_NAMES[name]})
    assert vllm_internals.changed_ragged_names() == []


def test_a_changed_name_is_refused_with_the_way_out(monkeypatch):
    name = "vllm.lora.model_manager:LRUCacheLoRAModelManager.gone"
    monkeypatch.setattr(vllm_internals, "RAGGED_NAMES", {name: ()})
    with pytest.raises(
        InputError, match=r"does not know vLLM .*\.gone changed; install vllm 0\.32\.0, or unset"
    ):
        vllm_internals.install_ragged()


def test_where_vllm_looks_up_the_ragged_classes():
    from vllm.lora import utils
    from vllm.lora.layers import VocabParallelEmbeddingWithLoRA
    from vllm.v1.worker import lora_model_runner_mixin

    assert "_all_lora_classes" in inspect.getsource(utils.from_layer)
    assert "LogitsProcessorWithLoRA(" in inspect.getsource(utils.from_layer_logits_processor)
    assert VocabParallelEmbeddingWithLoRA in utils._all_lora_classes or utils._all_lora_classes
    loader = lora_model_runner_mixin.LoRAModelRunnerMixin.load_lora_model
    assert "LRUCacheWorkerLoRAManager(" in inspect.getsource(loader)


def test_linear_layers_apply_lora_through_one_method():
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

    for method in (BaseLinearLayerWithLoRA._apply_sync, BaseLinearLayerWithLoRA._apply_base_forward):
        assert "self._apply_lora_to_output(" in inspect.getsource(method)
    assert "self.device" in inspect.getsource(BaseLinearLayerWithLoRA.create_lora_weights)


def test_logits_layer_gives_the_wrapper_its_stacked_tensors():
    from vllm.lora.layers import LogitsProcessorWithLoRA

    source = inspect.getsource(LogitsProcessorWithLoRA._get_logits)
    assert "add_lora_logits(\n            logits, hidden_states, self.lora_a_stacked" in source
    assert "self.device" in inspect.getsource(LogitsProcessorWithLoRA.create_lora_weights)


def test_the_registry_calls_back_when_an_adapter_leaves():
    from vllm.lora.model_manager import AdapterLRUCache

    left = []
    cache = AdapterLRUCache(2, left.append)
    for adapter in (1, 2, 3):
        cache[adapter] = None
    cache.remove_oldest()
    cache.clear()
    assert left == [1, 2, 3]


def test_dummy_adapters_keep_their_class_when_cloned():
    from lvnas_vllm.ragged.manager import DummyLoRA

    assert type(DummyLoRA(1, 8, {}).clone(2)) is DummyLoRA


def test_a_request_has_its_adapters_id_and_path():
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.llm_engine import LLMEngine

    request = LoRARequest("name", 3, "/path")
    assert (request.lora_int_id, request.lora_path, request.load_inplace) == (3, "/path", False)
    assert "lora_request" in inspect.signature(LLMEngine.add_request).parameters


def test_kernel_metadata_has_the_order_that_the_gpu_wrapper_unpacks():
    from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta

    source = inspect.getsource(LoRAKernelMeta.meta_args)
    order = ("token_lora_mapping[:", "token_indices_sorted_by_lora_ids[:", "num_tokens_per_lora,")
    order += ("lora_token_start_loc,", "active_lora_ids,", "no_lora_flag_cpu,", "num_active_loras,")
    places = [source.rindex(f"{'' if name == order[-1] else 'self.'}{name}") for name in order]
    assert places == sorted(places)
