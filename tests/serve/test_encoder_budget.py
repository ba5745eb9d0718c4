"""The images that one step encodes stay within the budget whose memory was measured at the start."""

import random

from cases import Case, draw_image
from served import compare

IMAGES = 3


def test_one_tile_images_far_apart_count_whole(engine, oracle, monkeypatch) -> None:
    """Of three images apart the cache keeps one tile of the last; the vision model runs on all tiles of all."""
    rng, runs = random.Random(0), []
    pictures = [draw_image(rng, 5) for _ in range(IMAGES)]
    cases = [Case(f"<|begin_of_text|>{'<|image|>is it ' * IMAGES}{n}?", pictures, None, 3) for n in range(8)]
    scheduler = engine.llm.llm_engine.engine_core.engine_core.scheduler
    monkeypatch.setattr(scheduler.encoder_cache_manager, "cache_size", 2 * IMAGES * 20)
    (handle,) = engine.llm.apply_model(
        lambda model: model.model.vision_model.register_forward_pre_hook(
            lambda _, inputs: runs.append(len(inputs[0]))
        )
    )
    try:
        outputs = engine.generate(cases)
    finally:
        handle.remove()
    assert sum(runs) == len(cases) * IMAGES and max(runs) == 2 * IMAGES, runs
    for case, output in zip(cases, outputs, strict=True):
        same, worst = compare(oracle, case, output)
        assert same and worst < 1e-4
