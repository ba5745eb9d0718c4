"""Which adapter each request asks for (the popularities of Punica's tests, and a trace's or the user's
own)."""

import random
from collections.abc import Callable, Sequence

from lvnas.errors import InputError, unknown
from lvnas_loadtest import specs

FORMS = {"uniform": (), "zipf": ("ALPHA",), "distinct": (), "identical": (), "trace": ()}

Choice = Callable[[int, random.Random], str]


def popularity(text: str, adapters: Sequence[str]) -> Choice:
    """A choice of adapter by request number and random source.

    `uniform`; `zipf:ALPHA` (the k-th adapter in proportion to k^-ALPHA, in the given order); `distinct`
    (each in turn, so that neighbours differ); `identical` (always the first); `weights:A=3,B=1`; `trace`
    (the recorded adapter, which the plan applies itself; uniform where a row has none).

    Raises:
        InputError: an unknown form, a weight for an unknown adapter, no adapters.
    """
    if not adapters:
        raise InputError("no adapters to ask for; name them with --models or give a --pack")
    if text.startswith("weights:"):
        return _weighted(adapters, _weights(text.removeprefix("weights:"), adapters))
    name, numbers = specs.parse("popularity", text, FORMS)
    if name == "zipf":
        return _weighted(adapters, [rank ** -numbers[0] for rank in range(1, len(adapters) + 1)])
    if name == "distinct":
        return lambda index, rng: adapters[index % len(adapters)]
    if name == "identical":
        return lambda index, rng: adapters[0]
    return _weighted(adapters, [1.0] * len(adapters))


def _weighted(adapters: Sequence[str], weights: Sequence[float]) -> Choice:
    return lambda index, rng: rng.choices(adapters, weights)[0]


def _weights(text: str, adapters: Sequence[str]) -> list[float]:
    weights = dict.fromkeys(adapters, 0.0)
    for part in text.split(","):
        name, _, value = part.rpartition("=")
        if name not in weights:
            raise unknown("adapter in the weights", name, adapters)
        try:
            weights[name] = float(value)
        except ValueError:
            weights[name] = -1.0
        if not 0 <= weights[name] < float("inf"):
            raise InputError(f"weight {part!r} is not a number >= 0; write it like {name}=2.5")
    if not sum(weights.values()):
        raise InputError(f"the weights {text!r} are all 0; at least one must be above 0")
    return list(weights.values())
