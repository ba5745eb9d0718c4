import io
import json
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoProcessor, MllamaForConditionalGeneration

from lvnas import bases
from lvnas.bases.tiny import Pretraining, tiny_folder
from lvnas.errors import InputError
from lvnas.tasks import load_task
from lvnas.tasks.batches import Collator


def pixel_batch(processor):
    examples = load_task("reverse", {"train": 2, "search": 0, "test": 0}).splits["train"]
    return {name: value for name, value in Collator(processor)(examples).items() if name != "labels"}


def test_tiny_loads_like_any_checkpoint(raw_tiny):
    model, processor = bases.load(str(raw_tiny))
    assert isinstance(model, MllamaForConditionalGeneration)
    assert 2e6 < sum(parameter.numel() for parameter in model.parameters()) < 4e6
    assert AutoConfig.from_pretrained(raw_tiny).image_token_index == processor.image_token_id
    assert json.loads((raw_tiny / "preprocessor_config.json").read_text())["image_processor_type"] == (
        "MllamaImageProcessor"
    )
    same = AutoProcessor.from_pretrained(raw_tiny)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Read the digits."}]}]
    text = same.apply_chat_template(chat, add_generation_prompt=True)
    assert text.startswith("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n<|image|>Read")
    assert same.tokenizer("Read", add_special_tokens=True)["input_ids"][0] == same.tokenizer.bos_token_id


def test_gates_are_open(raw_tiny):
    model, _ = bases.load(str(raw_tiny))
    gates = {
        name: value for name, value in model.named_parameters() if name.endswith(("gate", "attn", "ffn"))
    }
    gates = {name: value for name, value in gates.items() if value.numel() == 1}
    assert len(gates) == 3 + 2 + 2 * 2  # vision embeddings, the global layer, two cross-attention layers
    assert all(abs(value.item()) > 0.1 for value in gates.values())


def test_training_is_deterministic_and_cached(tmp_path):
    recipe = Pretraining(steps=2, batch_size=6)
    first, second = (tiny_folder(tmp_path / name, recipe) for name in "ab")
    assert first.name == second.name
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    before = (first / "model.safetensors").stat().st_mtime_ns
    assert tiny_folder(tmp_path / "a", recipe) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == before
    other = tiny_folder(tmp_path / "a", Pretraining(steps=2, batch_size=6, seed=1))
    assert other != first


def test_an_interrupted_training_leaves_nothing(tmp_path, monkeypatch):
    """Ctrl-C at the second step: no folder that a later run would take for the base."""
    from lvnas.bases import tiny

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(tiny, "save_processor", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tiny_folder(tmp_path, Pretraining(steps=1, batch_size=6))
    assert [path.name for path in (tmp_path / "bases").iterdir() if path.is_dir()] == []


def test_reference_vision_features_are_the_inputs_of_the_layers(raw_tiny):
    model, processor = bases.load(str(raw_tiny), dtype=torch.float64)
    vision = model.model.vision_model
    inputs = []
    for layer in vision.transformer.layers:
        layer.register_forward_pre_hook(
            lambda _module, args, kwargs: inputs.append(
                next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
            ),
            with_kwargs=True,
        )
    batch = pixel_batch(processor)
    batch = {name: batch[name] for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}
    features = vision(**batch).last_hidden_state
    width, patches = model.config.vision_config.hidden_size, vision.num_patches
    images, _, tiles = features.shape[:3]
    # transformers stacks the intermediate states last, hidden size before index
    intermediate = features[..., width:].reshape(images, tiles, patches, width, -1)
    for place, layer in enumerate(model.config.vision_config.intermediate_layers_indices):
        wanted = inputs[layer].reshape(images, tiles, -1, width)[:, :, :patches]
        torch.testing.assert_close(intermediate[..., place], wanted)


def test_vision_features_can_be_switched(raw_tiny):
    model, processor = bases.load(str(raw_tiny))
    batch = pixel_batch(processor)
    with torch.no_grad():
        reference = model(**batch).logits
        installed = bases.set_vision_features(model, "transformers")(**batch).logits
        again = bases.set_vision_features(model, "reference")(**batch).logits
    assert (reference - installed).abs().max() > 1e-3
    assert torch.equal(reference, again)
    with pytest.raises(InputError, match="reference, transformers"):
        bases.set_vision_features(model, "meta")


def test_a_serving_configuration_in_the_same_process_does_not_matter(raw_tiny):
    """vLLM registers the plugin's class for "mllama" with AutoConfig when an engine starts in this process."""
    from transformers import MllamaConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    class Serving(MllamaConfig):
        pass

    before = dict(CONFIG_MAPPING._extra_content)
    AutoConfig.register("mllama", Serving, exist_ok=True)
    try:
        model, _ = bases.load(str(raw_tiny))
        assert type(model.config) is MllamaConfig
        assert bases.meta_model(str(raw_tiny)).config.text_config.hidden_size == 192
    finally:
        CONFIG_MAPPING._extra_content.clear()
        CONFIG_MAPPING._extra_content.update(before)


@pytest.mark.parametrize(
    ("base", "said"),
    [("tinny", "allowed: tiny, llama-3.2-11b-vision"), ("../..", "allowed"), ("a/b/c", "allowed")],
)
def test_unknown_bases(base, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if base == "../..":
        said = "config.json"
    with pytest.raises(InputError, match=said):
        bases.resolve(base)


@pytest.mark.parametrize("name", ["AutoConfig", "AutoModelForCausalLM"])
def test_code_of_a_checkpoint_is_never_run(name, raw_tiny, tmp_path, lvnas, monkeypatch):
    """Not even when somebody would say yes to transformers' question on stdin."""
    folder, trace = tmp_path / "base", tmp_path / "it-ran"
    shutil.copytree(raw_tiny, folder)
    config = json.loads((folder / "config.json").read_text())
    if name == "AutoConfig":
        config["model_type"] = "evil"
    config["auto_map"] = {name: "evil.Evil"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(trace)!r}, 'w')\nclass Evil: pass\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\ny\n"))
    if name == "AutoConfig":
        with pytest.raises(InputError, match="lvnas runs none that comes with a checkpoint"):
            bases.load(str(folder))
    else:
        bases.load(str(folder))  # transformers' own class of this name is there
    assert not trace.exists()


def test_a_base_that_cannot_be_downloaded_is_one_line(lvnas):
    code, _, err = lvnas("params", "--base", "nobody/nothing", "--rank", 4)
    assert code == 2
    assert "nobody/nothing" in err
    assert err.count("\n") == 1
