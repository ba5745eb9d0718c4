"""The chat requests themselves: text of a wanted length, a small image, the server's options."""

import base64
import io
import json
import random
from typing import Any

import numpy as np
from PIL import Image

from lvnas_loadtest.plan import Plan, Planned

WORDS = """
answer area axis bar blue box chart circle color column count cross data day depth digit figure first
graph green half height image item label large last left length line list map mark mean month name number
page part picture plot point price rate red right row scale share size small square sum table text tick
title top total tree unit value view week width word year zero
""".split()  # noqa: SIM905


class Prompts:
    """Makes request bodies for a plan. Images are encoded here, once, so that encoding costs no time in
    the load."""

    def __init__(self, plan: Plan) -> None:
        self.workload = plan.workload
        rng = random.Random(f"images/{self.workload.seed}")
        sides = (
            [plan.image_side(rng) for _ in range(self.workload.image_pool)]
            if self.workload.image_share
            else []
        )
        self.images = [(side, data_url(side, number)) for number, side in enumerate(sides)]
        self.tokens_per_word = 1.0

    def body(self, planned: Planned) -> bytes:
        """The JSON body of `planned`: a streamed, greedy chat request that reports its token counts."""
        rng = random.Random(f"words/{self.workload.seed}/{planned.index}")
        words = max(1, round(planned.prompt_tokens / self.tokens_per_word))
        content: list[dict[str, Any]] = [{"type": "text", "text": " ".join(rng.choices(WORDS, k=words))}]
        if planned.image_side is not None:
            # The pool's image nearest in size to the one planned, by chance among equals.
            nearest = min(abs(side - planned.image_side) for side, _ in self.images)
            fitting = [url for side, url in self.images if abs(side - planned.image_side) == nearest]
            content.insert(0, {"type": "image_url", "image_url": {"url": rng.choice(fitting)}})
        _, model = self.workload.route(planned.adapter)
        return chat_body(model, content, planned.output_tokens, ignore_eos=self.workload.ignore_eos)


def chat_body(model: str, content: list[dict[str, Any]], max_tokens: int, *, ignore_eos: bool) -> bytes:
    """A greedy, streamed chat completion request with server-reported token counts, as JSON."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": max_tokens,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return json.dumps(body | ({"ignore_eos": True} if ignore_eos else {})).encode()


def data_url(side: int, seed: int) -> str:
    """A PNG of side x side pixels (8 x 8 random colours, so that the file stays small), as a data URL."""
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
