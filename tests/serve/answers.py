"""Answers of an engine in a process of its own, bit for bit: `python answers.py BASE ADAPTERS OPTIONS` prints JSON."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import conftest

BATCHES = 4
SIZE = conftest.LIMITS["max_num_seqs"]


def answers(engine, adapters: Sequence[str] = ()) -> list[list[list[list[float]]]]:
    """Per batch and request, [token, log probability] of each greedy token.

    The requests are the same whatever the adapters: every second one has an adapter where there are any.
    """
    from cases import draw_cases

    batches = [draw_cases(seed, SIZE, [None]) for seed in range(BATCHES)]
    for batch in batches if adapters else ():
        for number, case in enumerate(batch[1::2]):
            case.adapter = adapters[number % len(adapters)]
    return [[_read(output) for output in engine.generate(batch)] for batch in batches]


def _read(output) -> list[list[float]]:
    answer = output.outputs[0]
    return [
        [token, step[token].logprob] for token, step in zip(answer.token_ids, answer.logprobs, strict=True)
    ]


def main(base: Path, adapters: dict[str, str], options: dict) -> list[list[list[list[list[float]]]]]:
    """The answers without any adapter in use, and with `adapters`."""
    from served import Engine

    engine = Engine(base, adapters, **{**conftest.LIMITS, **options})
    return [answers(engine), answers(engine, list(adapters))]


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), *map(json.loads, sys.argv[2:]))))
