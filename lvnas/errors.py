"""The one error that users see."""

import math
from collections.abc import Iterable
from numbers import Integral, Real


class InputError(ValueError):
    """Bad input from the user: one line with the value, what is allowed and how to fix it.

    The command line prints it and exits with code 2; everything else that is raised is a bug.
    """


def unknown(what: str, value: object, allowed: Iterable[object]) -> InputError:
    """The error for a name that is not one of the `allowed` ones."""
    return InputError(f"unknown {what} {str(value)!r}; allowed: {', '.join(map(str, allowed))}")


def check_counts(**values: int) -> None:
    """Raises InputError unless every one of these settings is a whole number of at least 1."""
    for name, value in values.items():
        if not (isinstance(value, Integral) and value >= 1):
            raise InputError(f"{name} is {value!r}; it must be a whole number of at least 1")


def check_above_zero(**values: float) -> None:
    """Raises InputError unless every one of these settings is a finite number above 0."""
    for name, value in values.items():
        if not (isinstance(value, Real) and math.isfinite(value) and value > 0):
            raise InputError(f"{name.replace('_', ' ')} {value!r} is not a number above 0")


def check_seed(seed: int) -> None:
    """Raises InputError unless `seed` is one for every generator in use."""
    if not (isinstance(seed, Integral) and 0 <= seed < 1 << 32):
        raise InputError(f"seed {seed!r} is not a whole number from 0 to {(1 << 32) - 1}")
