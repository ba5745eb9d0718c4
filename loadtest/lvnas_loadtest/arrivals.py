"""When requests are sent: a closed loop of users, or an open loop that waits for nobody."""

import itertools
import math
import random
from collections.abc import Iterator

from lvnas_loadtest import specs

FORMS = {
    "closed": (),
    "poisson": ("RATE",),
    "gamma": ("RATE", "CV"),
    "constant": ("RATE",),
    "ramp": ("FROM", "TO"),
    "trace": ("FILE",),
}


def form(text: str) -> tuple[str, list[float]]:
    """The name and numbers of an arrival process.

    Raises:
        InputError: `text` is none of closed, poisson:RATE, gamma:RATE:CV, constant:RATE, ramp:FROM:TO,
        trace:FILE.
    """
    if text.startswith("trace:") and len(text) > len("trace:"):
        return "trace", []
    return specs.parse("arrivals", text, FORMS)


def times(text: str, duration: float, seed: int) -> Iterator[float]:
    """Sending times in seconds from the start, without end; the same for the same seed.

    `gamma:RATE:CV` has gaps of mean 1/RATE and coefficient of variation CV (CV 1 is Poisson, above 1 bursty).
    `ramp:FROM:TO` is a Poisson process whose rate goes linearly from FROM to TO requests/s over
    `duration`, and stays at TO; it is made from a unit-rate process by inverting the integrated rate.
    """
    name, numbers = form(text)
    rng = random.Random(f"arrivals/{seed}")
    if name == "constant":
        return (index / numbers[0] for index in itertools.count())
    if name == "ramp":
        units = itertools.accumulate(rng.expovariate(1.0) for _ in itertools.repeat(None))
        return (_invert_ramp(unit, numbers[0], numbers[1], duration) for unit in units)
    rate, cv = (numbers[0], 1.0) if name == "poisson" else (numbers[0], numbers[1])
    shape = 1 / cv**2
    gaps = (rng.gammavariate(shape, 1 / (shape * rate)) for _ in itertools.repeat(None))
    return itertools.accumulate(gaps)


def _invert_ramp(area: float, first: float, last: float, duration: float) -> float:
    """The time t at which first*t + (last-first)*t^2/(2*duration), the expected requests so far, is
    `area`."""
    whole = (first + last) / 2 * duration
    if area >= whole:
        return duration + (area - whole) / last
    slope = (last - first) / duration
    if abs(slope) < 1e-12:
        return area / first
    return (math.sqrt(first * first + 2 * slope * area) - first) / slope
