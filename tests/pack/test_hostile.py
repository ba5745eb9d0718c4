# ruff: noqa: E501
"""Every way an adapter's files can be wrong is refused with its own name, and nothing is written."""

import ast
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from makers import BASE, MODULES, TEXT, join, make_adapter, make_config, make_tensors, split
from safetensors.torch import save_file

from lvnas import adapters as adapters_module
from lvnas.adapter_config import _REFUSED
from lvnas.adapters import check_base, read_adapter
from lvnas.errors import InputError
from lvnas.pack import PackOptions, pack
from lvnas.tensorfile import MAX_HEADER, BrokenFile, TensorInfo
from lvnas.values import as_bytes, check_finite

Q = TEXT.format(0, "q_proj")
A = f"base_model.model.{Q}.lora_A.weight"
B = f"base_model.model.{Q}.lora_B.weight"
V_A, V_B = A.replace("q_proj", "v_proj"), B.replace("q_proj", "v_proj")
Breaker = Callable[[Path], None]


def weights(folder: Path) -> Path:
    return folder / "adapter_model.safetensors"


def header(change: Callable[[dict[str, Any]], Any]) -> Breaker:
    """Breaks the header by `change`, which edits it in place or returns another."""

    def breaker(folder: Path) -> None:
        found, data = split(weights(folder))
        join(weights(folder), change(found) or found, data)

    return breaker


def config(**changes: Any) -> Breaker:
    """Writes the configuration with `changes`."""
    return lambda folder: write_config(folder, json.dumps(make_config(MODULES, **changes)))


def write_config(folder: Path, text: str) -> None:
    (folder / "adapter_config.json").write_text(text)


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Breaker:
    """Writes the weights after `change` has edited them in place."""

    def breaker(folder: Path) -> None:
        found = make_tensors(MODULES, torch.float32, 0)
        change(found)
        save_file(found, weights(folder))

    return breaker


def raw(text: bytes, length: int | None = None) -> Breaker:
    """Writes a file whose header is `text`, announced as `length` bytes."""
    return lambda folder: join(weights(folder), text, b"", length)


def replace_file(name: str, make: Callable[[Path], Any]) -> Breaker:
    def breaker(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return breaker


def link_outside(path: Path) -> None:
    target = path.parent.parent / "secret"
    target.write_bytes(b"{}")
    path.symlink_to(target)


def shards(index: Any, second: dict[str, torch.Tensor] | None = None) -> Breaker:
    """Replaces the weights by shards `a.safetensors` (all tensors) and `b.safetensors` (`second`) with `index`."""

    def breaker(folder: Path) -> None:
        found = make_tensors(MODULES, torch.float32, 0)
        weights(folder).unlink()
        save_file(found, folder / "a.safetensors")
        if second is not None:
            save_file(second, folder / "b.safetensors")
        value = index(found) if callable(index) else index
        (folder / "adapter_model.safetensors.index.json").write_text(json.dumps({"weight_map": value}))

    return breaker


def cut(folder: Path, size: int) -> None:
    os.truncate(weights(folder), size)


BROKEN: dict[str, tuple[str, Breaker]] = {
    # the safetensors file
    "empty file": ("truncated", lambda folder: cut(folder, 0)),
    "cut in the header": ("truncated", lambda folder: cut(folder, 100)),
    "cut in the data": ("truncated", lambda folder: cut(folder, weights(folder).stat().st_size - 1)),
    "bytes at the end": ("trailing-bytes", lambda folder: join(weights(folder), *_longer(folder))),
    "header length 2**63": ("header-too-large", raw(b"{}", 1 << 63)),
    "header of gigabytes": ("header-too-large", raw(b"{}", MAX_HEADER + 1)),
    "header beyond the file": ("truncated", raw(b"{}", 1000)),
    "header not JSON": ("not-json", raw(b"{'a'}")),
    "header not UTF-8": ("not-json", raw(b'{"\xff":1}')),
    "header a list": ("not-an-object", raw(b"[]")),
    "header nested deeply": ("json-too-deep", raw(b'{"a":' + b"[" * 500_000)),
    "header with a huge integer": ("not-json", raw(b'{"a":' + b"9" * 5000 + b"}")),
    "header with NaN": ("not-json", raw(b'{"a":NaN}')),
    "tensor twice": ("duplicate-name", raw(b'{"a":{},"a":{}}')),
    "metadata not text": ("bad-metadata", header(lambda h: h.update(__metadata__={"a": 1}))),
    "path in a name": ("bad-tensor-name", header(lambda h: h.update({"../../etc/passwd": h.pop(A)}))),
    "empty name": ("bad-tensor-name", header(lambda h: h.update({"": h.pop(A)}))),
    "control character in a name": ("bad-tensor-name", header(lambda h: h.update({A + "\x1b[2J": h.pop(A)}))),
    "endless name": ("bad-tensor-name", header(lambda h: h.update({"a" * 600: h.pop(A)}))),
    "entry without dtype": ("bad-tensor-entry", header(lambda h: h[A].pop("dtype") and None)),
    "entry a number": ("bad-tensor-entry", header(lambda h: h.update({A: 7}))),
    "unknown dtype": ("unknown-dtype", header(lambda h: h[A].update(dtype="F13"))),
    "negative size": ("bad-shape", header(lambda h: h[A].update(shape=[-4, -24]))),
    "fractional size": ("bad-shape", header(lambda h: h[A].update(shape=[4.0, 24]))),
    "overflowing shape": ("size-mismatch", header(lambda h: h[A].update(shape=[1 << 40, 1 << 40]))),
    "shape beyond 64 bits": ("bad-shape", header(lambda h: h[A].update(shape=[1 << 70, 1]))),
    "nine dimensions": ("bad-shape", header(lambda h: h[A].update(shape=[1] * 9))),
    "shape does not fit offsets": ("size-mismatch", header(lambda h: h[A].update(shape=[4, 25]))),
    "offsets backwards": ("bad-offsets", header(lambda h: h[A]["data_offsets"].reverse())),
    "offset negative": ("bad-offsets", header(lambda h: h[A].update(data_offsets=[-384, 0]))),
    "one offset": ("bad-offsets", header(lambda h: h[A].update(data_offsets=[0]))),
    "offsets overlap": ("overlapping-offsets", header(lambda h: h.update({A + "2": h[A]}))),
    "offsets out of the file": ("gap-in-offsets", header(lambda h: h[A].update(data_offsets=[1 << 30, (1 << 30) + 384]))),
    "gap between tensors": ("gap-in-offsets", header(lambda h: h.pop(A) and None)),
    # what the tensors are
    "integers": ("wrong-dtype", tensors(lambda t: t.update({A: t[A].int()}))),
    "float64": ("wrong-dtype", tensors(lambda t: t.update({A: t[A].double()}))),
    "a convolution": ("not-a-matrix", tensors(lambda t: t.update({A: t[A][:, :, None, None]}))),
    "no A": ("missing-A", tensors(lambda t: t.pop(A))),
    "no B": ("missing-B", tensors(lambda t: t.pop(B))),
    "nothing": ("no-lora-weights", tensors(lambda t: t.clear())),
    "A and B of other ranks": ("rank-mismatch", tensors(lambda t: t.update({B: t[B][:, :3].clone()}))),
    "rank not the configured one": ("config-rank-mismatch", config(rank_pattern={"q_proj": 5})),
    "rank 0 in the tensors": ("config-rank-mismatch", tensors(lambda t: t.update({A: t[A][:0], B: t[B][:, :0]}))),
    "no inputs": ("empty-tensor", tensors(lambda t: t.update({A: t[A][:, :0].clone()}))),
    "module under two names": (
        "duplicate-module",
        tensors(lambda t: t.update({k.replace("model.language_model", "language_model.model"): t[k] + 0 for k in (V_A, V_B)})),
    ),
    "factor twice": ("duplicate-module", tensors(lambda t: t.update({A.replace("A.weight", "A.default.weight"): t[A] + 0}))),
    "another tensor": ("not-lora-weights", tensors(lambda t: t.update({"base_model.model.lm_head.weight": t[A] + 0}))),
    "DoRA magnitudes": ("dora", tensors(lambda t: t.update({A.replace("lora_A.weight", "lora_magnitude_vector"): t[A][0].clone()}))),
    "bias of B": ("lora-bias", tensors(lambda t: t.update({B.replace("weight", "bias"): t[B][:, 0].clone()}))),
    "embedding": (
        "embedding-lora",
        tensors(lambda t: t.update({"base_model.model.embed_tokens.lora_embedding_A": t[A] + 0})),
    ),
    "base weights": (
        "base-weights-saved",
        tensors(lambda t: t.update({"base_model.model.embed_tokens.base_layer.weight": t[A] + 0})),
    ),
    "AdaLoRA tensor in a LoRA": ("adalora-tensor", tensors(lambda t: t.update({A.replace("A.weight", "E"): t[A][:, :1] + 0}))),
    "AdaLoRA without E": ("missing-E", config(peft_type="ADALORA", rank_pattern=None)),
    "module outside target_modules": ("not-a-target", config(target_modules=["v_proj", "gate_proj"])),
    # the configuration
    "no configuration": ("missing-file", lambda folder: (folder / "adapter_config.json").unlink()),
    "configuration not JSON": ("not-json", lambda folder: write_config(folder, "{")),
    "configuration a list": ("not-an-object", lambda folder: write_config(folder, "[]")),
    "configuration nested deeply": ("json-too-deep", lambda folder: write_config(folder, "[" * 200_000)),
    "configuration too large": ("json-too-large", lambda folder: write_config(folder, " " * ((16 << 20) + 1))),
    "option twice": ("duplicate-name", lambda folder: write_config(folder, '{"r": 8, "r": 4}')),
    "prefix tuning": ("unsupported-method", config(peft_type="PREFIX_TUNING")),
    "DoRA": ("dora", config(use_dora=True)),
    "LoRA bias": ("lora-bias", config(lora_bias=True)),
    "trained biases": ("bias", config(bias="all")),
    "layer replication": ("layer-replication", config(layer_replication=[[0, 2]])),
    "aLoRA": ("alora", config(alora_invocation_tokens=[1])),
    "QALoRA": ("qalora", config(use_qalora=True)),
    "BD-LoRA": ("bdlora", config(use_bdlora={"nblocks": 2})),
    "KaSA": ("kasa", config(kasa_config={"beta": 1})),
    "MonteCLoRA": ("monteclora", config(monteclora_config={"a": 1})),
    "Arrow": ("arrow", config(arrow_config={"top_k": 1})),
    "parameters": ("target-parameters", config(target_parameters=["experts.gate_up_proj"])),
    "token embeddings": ("trainable-tokens", config(trainable_token_indices=[1])),
    "LoftQ": ("loftq", config(init_lora_weights="loftq")),
    "unknown initialisation": ("unknown-init", config(init_lora_weights="magic")),
    "rank 0": ("rank-below-one", config(r=0)),
    "rank negative": ("rank-below-one", config(rank_pattern={"q_proj": -8})),
    "rank a fraction": ("bad-rank", config(r=8.5)),
    "rank true": ("bad-rank", config(r=True)),
    "rank of millions": ("rank-too-large", config(r=10**6)),
    "alpha text": ("bad-alpha", config(lora_alpha="16")),
    "alpha infinite": ("bad-alpha", lambda folder: write_config(folder, '{"lora_alpha": 1e999}')),
    "alpha 0": ("zero-alpha", config(lora_alpha=0)),
    "rank_pattern a list": ("bad-option", config(rank_pattern=[1])),
    "AdaLoRA pattern not booleans": ("bad-rank-pattern", config(peft_type="ADALORA", rank_pattern={"q.lora_E": 4})),
    "pattern no regular expression": ("bad-pattern", config(rank_pattern={"(q_proj": 4})),
    "pattern without end": ("slow-pattern", config(alpha_pattern={r"(x|.|\w|[a-z._])*\d\d\d": 4})),
    "flag text": ("bad-option", config(use_rslora="yes")),
    "base name unprintable": ("bad-option", config(base_model_name_or_path="a\x00b")),
    "target_modules a number": ("bad-option", config(target_modules=7)),
    # the folder
    "weights missing": ("missing-file", lambda folder: weights(folder).unlink()),
    "weights a folder": ("not-a-file", replace_file("adapter_model.safetensors", Path.mkdir)),
    "weights a pipe": ("not-a-file", replace_file("adapter_model.safetensors", os.mkfifo)),
    "weights link outside": ("link-out-of-folder", replace_file("adapter_model.safetensors", link_outside)),
    "configuration links outside": ("link-out-of-folder", replace_file("adapter_config.json", link_outside)),
    "weights link to themselves": (
        "missing-file",
        replace_file("adapter_model.safetensors", lambda path: path.symlink_to(path.name)),
    ),
    "weights link to nothing": (
        "missing-file",
        replace_file("adapter_model.safetensors", lambda path: path.symlink_to("nowhere")),
    ),
    "pickle": ("pickle", lambda folder: weights(folder).rename(folder / "adapter_model.bin")),
    "index a list": ("bad-index", shards([])),
    "shard outside": ("bad-shard-name", shards({A: "../a.safetensors"})),
    "shard missing": ("missing-file", shards({A: "c.safetensors"})),
    "tensor in two shards": (
        "duplicate-name",
        shards(lambda t: dict.fromkeys(t, "a.safetensors") | {"x": "b.safetensors"}, {A: torch.zeros(1)}),
    ),
    "tensor not in the index": ("index-mismatch", shards({A: "a.safetensors"})),
    "tensor in no shard": ("index-mismatch", shards(lambda t: dict.fromkeys([*t, "x"], "a.safetensors"))),
    # lvnas.json
    "metadata of another format": ("unknown-format", lambda folder: (folder / "lvnas.json").write_text('{"format": "x/9"}')),
    "metadata with unknown features": (
        "bad-option",
        lambda folder: (folder / "lvnas.json").write_text('{"format": "lvnas-adapter/1", "vision_features": "x"}'),
    ),
}  # fmt: skip


def _longer(folder: Path) -> tuple[dict[str, Any], bytes]:
    found, data = split(weights(folder))
    return found, data + b"\0"


@pytest.mark.parametrize("name", BROKEN)
def test_broken_adapter_is_refused_by_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lvnas.adapter_config.PATTERN_SECONDS", 0.2)
    reason, breaker = BROKEN[name]
    folder = make_adapter(tmp_path / "adapter")
    read_adapter(folder)  # it is whole before it is broken
    breaker(folder)
    with pytest.raises(BrokenFile) as caught:
        pack([read_adapter(folder)], tmp_path / "pack")
    assert caught.value.reason == reason
    assert str(folder) in str(caught.value)
    assert not (tmp_path / "pack").exists()


@pytest.mark.parametrize(
    ("value", "kind"), [(float("nan"), "NaN"), (float("inf"), "infinity"), (float("-inf"), "infinity")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["pad", "ragged"])
def test_values_that_are_not_finite(
    value: float, kind: str, dtype: torch.dtype, layout: str, tmp_path: Path
) -> None:
    found = make_tensors(MODULES, dtype, 0)
    found[B][5, 1] = value
    folder = make_adapter(tmp_path / "adapter", dtype=dtype)
    save_file(found, weights(folder))
    with pytest.raises(BrokenFile, match=rf"{re.escape(B)}' holds an? {kind}, first at element 21") as caught:
        pack([read_adapter(folder)], tmp_path / "pack", PackOptions(layout=layout))
    assert caught.value.reason == "not-finite"
    assert not list((tmp_path / "pack").glob("adapters/*"))
    assert not list((tmp_path / "pack").glob("adapters/.*"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_value_of_two_bytes_is_judged_rightly(dtype: torch.dtype) -> None:
    every = torch.arange(65536).to(torch.uint16).view(dtype)
    is_finite = every.isfinite()

    def accepted(values: torch.Tensor) -> bool:
        data = bytearray(as_bytes(values))
        name = {torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
        try:
            check_finite(TensorInfo(Path("x"), "t", name, tuple(values.shape), 0, len(data)), data)
        except BrokenFile:
            return False
        return True

    assert accepted(every[is_finite])
    assert not any(accepted(every[index : index + 1]) for index in (~is_finite).nonzero().flatten().tolist())


def test_another_base_or_shape(tmp_path: Path) -> None:
    adapter = read_adapter(make_adapter(tmp_path / "adapter"))
    shapes = {name: (inputs, outputs) for name, (inputs, outputs, _) in MODULES.items()}
    check_base(adapter, shapes, BASE)
    with pytest.raises(BrokenFile, match="shape-mismatch"):
        check_base(adapter, shapes | {Q: (24, 25)}, BASE)
    del shapes[Q]
    with pytest.raises(BrokenFile, match="not-in-base"):
        check_base(adapter, shapes, BASE)


def test_a_short_name_and_its_repository_are_one_base(tmp_path: Path) -> None:
    hub = "meta-llama/Llama-3.2-11B-Vision-Instruct"
    short = read_adapter(make_adapter(tmp_path / "a", base_model_name_or_path="llama-3.2-11b-vision"))
    long = read_adapter(make_adapter(tmp_path / "b", base_model_name_or_path=hub))
    pack([short, long], tmp_path / "pack", PackOptions(layout="group"))
    [script] = (tmp_path / "pack").glob("serving/*/*.sh")
    assert f"vllm serve {hub} " in script.read_text()


def test_adapters_of_two_bases_or_with_one_name(tmp_path: Path) -> None:
    first = read_adapter(make_adapter(tmp_path / "a"))
    other = read_adapter(make_adapter(tmp_path / "b", base_model_name_or_path="example/other"))
    with pytest.raises(InputError, match="trained on 'example/other', not on 'example/tiny-base'"):
        pack([first, other], tmp_path / "pack")
    with pytest.raises(InputError, match="trained on 'example/tiny-base', not on 'example/third'"):
        pack([first], tmp_path / "pack", base="example/third")
    with pytest.raises(InputError, match="two adapters are called 'a'"):
        pack([first, read_adapter(tmp_path / "a")], tmp_path / "pack")
    with pytest.raises(InputError, match="give it with --base"):
        pack([read_adapter(make_adapter(tmp_path / "c", base_model_name_or_path=None))], tmp_path / "pack")
    assert not (tmp_path / "pack").exists()


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "a b", "x" * 97, "né"])
def test_adapter_names_that_could_leave_the_pack(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="adapter name"):
        read_adapter(make_adapter(tmp_path / "adapter"), name)


def test_every_named_fault_is_tried_here() -> None:
    """A new `BrokenFile` in the reader needs a broken adapter in this file."""
    package = Path(adapters_module.__file__).parent
    named = {reason for reason, _ in _REFUSED.values()}
    for file in ("tensorfile.py", "adapters.py", "lora_modules.py", "adapter_config.py", "values.py"):
        for node in ast.walk(ast.parse((package / file).read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "BrokenFile":
                named |= {n.value for n in ast.walk(node.args[1]) if isinstance(getattr(n, "value", 0), str)}
    tried = {reason for reason, _ in BROKEN.values()} | {
        "not-finite",
        "shape-mismatch",
        "not-in-base",
        "missing-",
    }
    assert named - tried == {"changed-while-read", "bad-ranknum"}
    assert len(BROKEN) >= 40
