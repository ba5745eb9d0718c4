"""Whole numbers at random: prompt and output lengths in tokens, image sides in pixels."""

import random
from collections.abc import Callable

from lvnas.errors import InputError
from lvnas_loadtest import specs

FORMS = {
    "fixed": ("N",),
    "uniform": ("LOW", "HIGH"),
    "normal": ("MEAN", "SD"),
    "lognormal": ("MEDIAN", "SIGMA"),
}


def distribution(what: str, text: str) -> Callable[[random.Random], int]:
    """A sampler of whole numbers >= 1 for `text`: `64`, `fixed:64`, `uniform:16:128`, `normal:64:8`,
    `lognormal:64:0.5`.

    Raises:
        InputError: `text` fits none of the forms.
    """
    if text.isdecimal() and int(text) < 1:
        allowed = ", ".join(("N", *(specs.usage(form) for form in FORMS.items() if form[0] != "fixed")))
        raise InputError(f"{what} {text!r} must be at least 1; allowed: {allowed}")
    name, numbers = specs.parse(what, f"fixed:{text}" if text.isdecimal() else text, FORMS)
    if name == "fixed":
        return lambda rng: round(numbers[0])
    low, high = numbers
    if name == "uniform":
        if low > high:
            raise InputError(f"{what} {text!r}: the low end is above the high end; swap them")
        return lambda rng: rng.randint(max(1, round(low)), round(high))
    if name == "normal":
        return lambda rng: max(1, round(rng.normalvariate(low, high)))
    return lambda rng: max(1, round(low * rng.lognormvariate(0.0, high)))
