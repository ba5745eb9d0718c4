"""Parity in other settings than the session's engine: checkpoint layouts, semantics, precision, preemption."""

from pathlib import Path

import pytest
from variant import run


def test_preempted_requests_keep_their_own_images(tmp_path: Path) -> None:
    """A cache so small that requests are preempted and resumed beside new ones."""
    limits = {"max_num_seqs": 8, "max_model_len": 192, "max_num_batched_tokens": 192}
    engine = {"block_size": 32, "num_gpu_blocks_override": 40, **limits}
    result = run(
        tmp_path, adapters=["everything", "vision-1", "cross-kv-1"], engine=engine, count=32, tokens=48
    )
    assert result["preemptions"] > 0
    assert (result["same"], result["worst"] < 1e-4) == (result["cases"], True), result


def test_module_names_tied_head_and_the_semantics_of_transformers(tmp_path: Path) -> None:
    result = run(
        tmp_path,
        checkpoint={"tie": True},
        module_names=True,
        semantics={"features": "transformers"},
        count=40,
    )
    assert (result["same"], result["worst"] < 1e-4) == (result["cases"], True), result


@pytest.mark.full
def test_rows_before_the_image_as_in_metas_code(tmp_path: Path) -> None:
    result = run(tmp_path, adapters=["everything"], semantics={"pre_image_rows": "reference"}, count=40)
    assert (result["same"], result["worst"] < 1e-4) == (result["cases"], True), result


@pytest.mark.full
def test_real_tile_geometry(tmp_path: Path) -> None:
    """560-pixel tiles: 6404 image tokens, and the limits raised for them."""
    draw = {"tile": 560, "most_images": 1}
    engine = {"limit_mm_per_prompt": {"image": 2}}
    result = run(
        tmp_path, checkpoint={"image_size": 560}, adapters=["everything"], engine=engine, draw=draw, count=6
    )
    assert (result["same"], result["worst"] < 1e-4) == (result["cases"], True), result


@pytest.mark.full
@pytest.mark.parametrize("ragged", ["0", "1"], ids=["stock", "ragged"])
def test_tensor_parallel_two(tmp_path: Path, ragged: str) -> None:
    """Vision heads, cross-attention's key-value heads and every LoRA are cut in two."""
    adapters = ["everything", "vision-1", "cross-kv-1"]
    result = run(tmp_path, {"LVNAS_RAGGED": ragged}, adapters=adapters, engine={"tensor_parallel_size": 2})
    assert (result["same"], result["worst"] < 1e-4) == (result["cases"], True), result
