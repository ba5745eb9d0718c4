"""Is an answer right? One function per metric: (answer, truth) -> 0..1."""

import re
from collections.abc import Callable


def exact(answer: str, truth: str) -> float:
    """1 where the answers are equal, white space and case aside."""
    return float(_plain(answer) == _plain(truth))


def yes_no(answer: str, truth: str) -> float:
    """1 where both say yes or both say no (or true and false), looking at the first word."""
    words = {"true": "yes", "false": "no"}
    first, wanted = (re.sub(r"^\W*(\w*).*", r"\1", _plain(text)) for text in (answer, truth))
    return float(words.get(first, first) == words.get(wanted, wanted))


def anls(answer: str, truth: str) -> float:
    """Average normalised Levenshtein similarity (Biten et al. 2019): 1 - distance / length, 0 below 0.5."""
    answer, truth = _plain(answer), _plain(truth)
    longest = max(len(answer), len(truth))
    similarity = 1 - _levenshtein(answer, truth) / longest if longest else 1.0
    return similarity if similarity >= 0.5 else 0.0


def relaxed(answer: str, truth: str) -> float:
    """ChartQA's relaxed accuracy: numbers within 5% of the truth, other answers exactly."""
    return numeric(answer, truth, tolerance=0.05)


def numeric(answer: str, truth: str, tolerance: float = 0.01) -> float:
    """Numbers within `tolerance` (relative) of the truth; answers that are not numbers exactly."""
    given, wanted = _number(answer), _number(truth)
    if given is None or wanted is None:
        return exact(answer, truth)
    return float(abs(given - wanted) <= tolerance * abs(wanted))


def option(answer: str, truth: str) -> float:
    """Multiple choice: 1 where both name the same option letter, or where the answers are equal."""
    given, wanted = _letter(answer), _letter(truth)
    return float(given == wanted) if given and wanted else exact(answer, truth)


def vqarad(answer: str, truth: str) -> float:
    """VQA-RAD: closed questions (yes or no) by `yes_no`, open ones by `exact`."""
    closed = _plain(truth).rstrip(".") in ("yes", "no")
    return (yes_no if closed else exact)(answer, truth)


METRICS: dict[str, Callable[[str, str], float]] = {
    metric.__name__: metric for metric in (exact, yes_no, anls, relaxed, numeric, option, vqarad)
}


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".")


def _number(text: str) -> float | None:
    cleaned = _plain(text).replace(",", "").lstrip("$").strip()
    percent = cleaned.endswith("%")
    try:
        return float(cleaned.removesuffix("%")) / (100 if percent else 1)
    except ValueError:
        return None


def _letter(text: str) -> str | None:
    match = re.fullmatch(r"(?:answer\s*:\s*)?\(?([a-z0-9])(?:[).:]+(?:\s.*)?)?", _plain(text))
    return match[1] if match else None


def _levenshtein(first: str, second: str) -> int:
    row = list(range(len(second) + 1))
    for i, left in enumerate(first, 1):
        above, row[0] = row[0], i
        for j, right in enumerate(second, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (left != right))
    return row[-1]
