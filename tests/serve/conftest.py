"""One in-process engine for all serving tests, over a random tiny checkpoint and many adapters."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # the sampler's small compiled helpers cost 20 s

from checkpoints import make_adapter, make_checkpoint
from many_adapters import ADAPTERS, DTYPE

from lvnas.bases import resolve

LIMITS = {"max_model_len": 256, "max_num_seqs": 8, "limit_mm_per_prompt": {"image": 3}}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint, or the base that LVNAS_TEST_BASE names."""
    if base := os.environ.get("LVNAS_TEST_BASE"):
        return Path(resolve(base))
    return make_checkpoint(tmp_path_factory.mktemp("serve") / "base")


@pytest.fixture(scope="session")
def adapters(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        name: make_adapter(checkpoint, folder / name, seed, **spec)
        for seed, (name, spec) in enumerate(ADAPTERS.items(), start=1)
    }


@pytest.fixture(scope="session")
def oracle(checkpoint: Path, adapters: dict[str, Path]):
    from oracle import Oracle

    return Oracle(checkpoint, adapters)


@pytest.fixture(scope="session")
def engine(checkpoint: Path, adapters: dict[str, Path]) -> Iterator:
    """Three slots for eight adapters: they take turns."""
    from served import Engine

    lora = {"enable_lora": True, "max_loras": 3, "max_cpu_loras": 4, "max_lora_rank": 16}
    engine = Engine(checkpoint, adapters, dtype=DTYPE, **lora, **LIMITS)
    has_arena = engine.llm.collective_rpc(
        lambda worker: hasattr(worker.model_runner.lora_manager._adapter_manager, "arena")
    )
    assert has_arena == [os.environ.get("LVNAS_RAGGED") == "1"], "the other LoRA manager runs"
    yield engine
