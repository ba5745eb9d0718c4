"""The Triton kernels against the float32 oracle, in Triton's interpreter on CPU.

The interpreter has to be chosen before triton is imported, so the first test runs the others in a new process.
"""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from test_ragged_ops import POPULARITY, RANKS, SITE, SLOTS, TOLERANCE, adapters, oracle, slots_of

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="run by test_in_the_interpreter")


@pytest.mark.skipif(INTERPRETED, reason="starts the others")
def test_in_the_interpreter():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "passed" in done.stdout or "." in done.stdout


@pytest.mark.skipif(INTERPRETED, reason="needs the compiler")
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("tuned", ["DECODE", "PREFILL"])
def test_kernels_compile_for_a_gpu(tuned, aligned):
    """To PTX of an H100 or H200, without one; aligned layers move more than a number at a time."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lvnas_vllm.ragged import triton_ops

    tuning = getattr(triton_ops, tuned)
    pointers = {"table": "*i64", "h": "*fp32", "x": "*bf16", "y": "*bf16", "arena": "*bf16"}
    pointers |= dict.fromkeys(("members", "counts", "starts", "active", "bounds"), "*i32")
    constants = {"BLOCK_T": tuning.tokens, "BLOCK_R": triton_ops.BLOCK_R, "BLOCK_D": tuning.inputs}
    constants |= {"BLOCK_O": tuning.outputs, "SPLITS": tuning.splits, "ALIGNED": aligned, "IEEE": False}
    multiples = {*pointers, "D", "max_rank", "x_stride", "y_stride"}
    for kernel in (triton_ops.shrink_kernel, triton_ops.expand_kernel):
        names = list(enumerate(kernel.arg_names))
        source = ASTSource(
            kernel,
            {name: "constexpr" if name in constants else pointers.get(name, "i32") for _, name in names},
            {(i,): constants[name] for i, name in names if name in constants},
            {(i,): [["tt.divisibility", 16]] for i, name in names if name in multiples},
        )
        options = {"num_warps": tuning.warps, "num_stages": tuning.stages}
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        assert compiled.metadata.shared <= 100 * 1024
        single = re.findall(r"(?:ld|st)\.global[^;]*\.b16", compiled.asm["ptx"])
        assert not single or (kernel is triton_ops.expand_kernel and not aligned)


def segments(slots):
    """vLLM's own metadata of a step: tokens sorted by slot, -1 first."""
    from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta

    meta = LoRAKernelMeta.make(SLOTS, max(len(slots), 1), "cpu")
    meta.prepare_tensors(torch.from_numpy(slots.astype(np.int32)))
    return meta.meta_args(len(slots), False)[1:]


def run(y, x, site, slots):
    from lvnas_vllm.ragged.triton_ops import add_ragged_lora

    highest = max(16, int(site.table[..., 2].max()))
    add_ragged_lora(
        y,
        x,
        *(site.arena, site.table, site.device_bounds, *segments(slots)),
        *(highest, max(site.outputs), site.aligned),
    )


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("ranks", ["0", "1", "3", "16", "32", "mixed"])
@pytest.mark.parametrize("tokens", [1, 2, 3, 7])
def test_equals_float32_oracle(dtype, ranks, tokens):
    weights, site = adapters(RANKS[ranks], dtype)
    site.arena.nan_to_num_(nan=1e4)  # the interpreter's masked loads must still not see it
    for popularity in POPULARITY:
        slots = slots_of(tokens, popularity)
        x, y = torch.randn(tokens, SITE.inputs).to(dtype), torch.randn(tokens, sum(SITE.outputs)).to(dtype)
        wanted, got = oracle(y, x, weights, slots), y.clone()
        run(got, x, site, slots)
        scale = wanted.abs().amax(1, keepdim=True).clamp_min(1)
        assert ((got.float() - wanted).abs() / scale).max() < TOLERANCE[dtype], popularity
        untouched = torch.from_numpy(slots < 0)
        assert torch.equal(got[untouched], y[untouched])


@interpreted
def test_prefill_tuning_and_a_repeat_is_exact():
    weights, site = adapters(RANKS["mixed"], torch.float32)
    slots = slots_of(266, "zipf")
    x, y = torch.randn(266, SITE.inputs), torch.randn(266, sum(SITE.outputs))
    first, second = y.clone(), y.clone()
    run(first, x, site, slots)
    run(second, x, site, slots)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, oracle(y, x, weights, slots), rtol=1e-4, atol=1e-3)


@interpreted
def test_the_op_traces_without_a_device():
    from torch._subclasses.fake_tensor import FakeTensorMode

    from lvnas_vllm.ragged.triton_ops import add_ragged_lora

    _, site = adapters(RANKS["4"], torch.float32)
    real = [torch.zeros(2, 161), torch.zeros(2, 96), site.arena, site.table, site.device_bounds]
    real += segments(np.zeros(2, np.int32))
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(tensor) for tensor in real]
        assert add_ragged_lora(*fake, 16, 80, False) is None


@interpreted
def test_decode_and_prefill_are_tuned_apart():
    from lvnas_vllm.ragged.triton_ops import tuning

    assert tuning(8, 4096).splits > tuning(4096, 4096).splits == 1
    assert tuning(8, 4096).tokens < tuning(4096, 4096).tokens
    assert tuning(8, 100).splits == 1
