"""The one grammar of a workload's options: `name`, `name:1.5` or `name:2:0.5`."""

from collections.abc import Iterable, Mapping

from lvnas.errors import InputError, unknown


def parse(what: str, text: str, forms: Mapping[str, tuple[str, ...]]) -> tuple[str, list[float]]:
    """The name and numbers in `text`.

    Args:
        what: what the option is, for the error.
        forms: the allowed names, each with the names of its numbers, all of them needed and above zero.

    Raises:
        InputError: an unknown name, the wrong number of numbers, or one that is not above zero.
    """
    name, *parts = text.split(":")
    if name not in forms:
        raise unknown(what, text, map(usage, forms.items()))
    try:
        numbers = [float(part) for part in parts]
    except ValueError:
        numbers = []
    if len(numbers) != len(forms[name]) or not all(0 < number < float("inf") for number in numbers):
        form = usage((name, forms[name]))
        raise InputError(f"{what} {text!r} does not fit {form}: give {len(forms[name])} numbers above 0")
    return name, numbers


def usage(form: tuple[str, tuple[str, ...]]) -> str:
    """How a form is written: `gamma:RATE:CV`."""
    return ":".join((form[0], *form[1]))


def seconds(text: str) -> float:
    """The seconds in `90`, `90s`, `1.5m` or `1h`.

    Raises:
        InputError: anything else.
    """
    unit = {"s": 1, "m": 60, "h": 3600}.get(text[-1:], 0)
    try:
        value = float(text[:-1]) * unit if unit else float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise InputError(f"duration {text!r} is not like 90, 90s, 1.5m or 1h")
    return value


def limits(texts: Iterable[str]) -> dict[str, float]:
    """SLOs from `ttft:200` pairs, in ms, as `vllm bench serve --goodput` writes them.

    Raises:
        InputError: a text that is no NAME:MS pair (the workload checks the names).
    """
    found = {}
    for text in texts:
        name, _, value = text.partition(":")
        try:
            found[name] = float(value)
        except ValueError:
            raise InputError(f"SLO {text!r} is not like ttft:200 (ms)") from None
    return found
