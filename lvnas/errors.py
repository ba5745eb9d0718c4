"""The one error that users see."""

from collections.abc import Iterable


class InputError(ValueError):
    """Bad input from the user: one line with the value, what is allowed and how to fix it.

    The command line prints it and exits with code 2; everything else that is raised is a bug.
    """


def unknown(what: str, value: object, allowed: Iterable[object]) -> InputError:
    """The error for a name that is not one of the `allowed` ones."""
    return InputError(f"unknown {what} {str(value)!r}; allowed: {', '.join(map(str, allowed))}")
