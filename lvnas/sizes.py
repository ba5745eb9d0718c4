"""Sizes in bytes as people write them: 100MB, 512MiB, 1.5GB."""

import re

from lvnas.errors import InputError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}


def parse_bytes(text: str) -> int:
    """`"100MB"` -> 100_000_000, `"512MiB"` -> 536_870_912, `"4096"` -> 4096.

    Raises:
        InputError: not a size of at least one byte.
    """
    matched = re.fullmatch(r"(\d{1,18}(?:\.\d+)?)\s*((?:[kmg]i?)?)b?", text.strip().lower())
    size = int(float(matched[1]) * _UNITS[matched[2]]) if matched else 0
    if size < 1:
        raise InputError(f"{text!r} is no size; write it like 100MB or 512MiB")
    return size
