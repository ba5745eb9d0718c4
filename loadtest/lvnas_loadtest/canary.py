"""Canary questions: a wrong adapter answers fast and with status 200, so only its words can give it away.

Before the load, each adapter answers a few fixed questions, greedily. During the load it is asked again,
and the answers are compared: another adapter's recorded answers mean that the server used the wrong adapter.
"""

import itertools
from dataclasses import dataclass, field
from typing import Any

from geventhttpclient import HTTPClient

from lvnas_loadtest.prompts import chat_body, data_url
from lvnas_loadtest.records import Record
from lvnas_loadtest.sse import connect, stream_chat
from lvnas_loadtest.workload import Workload

QUESTIONS = (
    "What does the picture show? Answer in one sentence.",
    "Count from one to ten and then stop.",
    "Name the largest number that you can see.",
    "Which of the values is the smallest, and why?",
)
MARGIN = 2
"""Answers in which two adapters must differ to be told apart: other batches round differently, and one rounded answer
may happen to be another adapter's."""
TOKENS = 16
IMAGE_SIDE = 64

Answers = tuple[str, ...]


def distance(one: Answers, other: Answers) -> int:
    """In how many answers they differ."""
    return sum(a != b for a, b in zip(one, other, strict=True))


@dataclass
class Canary:
    """Asks one server's adapters the same questions before and during a load."""

    workload: Workload
    recorded: dict[str, Answers] = field(default_factory=dict)
    questions: int = 0
    checks: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._clients: dict[str, HTTPClient] = {}
        self._turns = itertools.cycle(self.workload.adapters)

    def record(self) -> None:
        """Records each adapter's answers, with one question more until all adapters can be told apart."""
        for self.questions in range(MARGIN, len(QUESTIONS) + 1):
            self.recorded = {adapter: self._ask(adapter) for adapter in self.workload.adapters}
            if not self.alike():
                return

    def alike(self) -> list[list[str]]:
        """Pairs of adapters whose recorded answers differ in fewer than MARGIN questions."""
        pairs = itertools.combinations(self.recorded.items(), 2)
        return [[one, other] for (one, known), (other, theirs) in pairs if distance(known, theirs) < MARGIN]

    def check_next(self, at: float) -> None:
        """Asks the adapter whose turn it is; `at` is noted with the verdict."""
        adapter = next(self._turns)
        answers = self._ask(adapter)
        verdict = self.verdict(adapter, answers)
        self.checks.append({"at": at, "adapter": adapter, "verdict": verdict, "answers": list(answers)})

    def verdict(self, adapter: str, answers: Answers) -> str:
        """`same`; `wrong: NAME` for the answers of an adapter that can be told apart; `changed` for any others;
        `failed`."""
        if answers == self.recorded[adapter]:
            return "same"
        if any(answer.startswith("failed: ") for answer in answers):
            return "failed"
        far = distance(answers, self.recorded[adapter]) >= MARGIN
        others = [name for name, known in self.recorded.items() if far and known == answers]
        return f"wrong: {others[0]}" if others else "changed"

    def report(self) -> dict[str, Any]:
        """Counts of verdicts, the checks, and which adapters the questions cannot tell apart."""
        verdicts = [check["verdict"] for check in self.checks]
        return {
            "questions": self.questions,
            "checks": len(verdicts),
            "same": verdicts.count("same"),
            "changed": verdicts.count("changed"),
            "failed": verdicts.count("failed"),
            "wrong": sum(verdict.startswith("wrong") for verdict in verdicts),
            "indistinguishable": self.alike(),
            "events": [check for check in self.checks if check["verdict"] != "same"],
            "answers": {adapter: list(answers) for adapter, answers in self.recorded.items()},
        }

    def _ask(self, adapter: str) -> Answers:
        return tuple(self._answer(adapter, number) for number in range(self.questions))

    def _answer(self, adapter: str, number: int) -> str:
        url, model = self.workload.route(adapter)
        client = self._clients.setdefault(url, connect(url, 2, self.workload.timeout))
        content: list[dict[str, Any]] = [{"type": "text", "text": QUESTIONS[number]}]
        if self.workload.image_share and number % 2 == 0:
            content.insert(
                0, {"type": "image_url", "image_url": {"url": data_url(IMAGE_SIDE, 1000 + number)}}
            )
        record = Record(adapter=adapter)
        stream_chat(client, chat_body(model, content, TOKENS, ignore_eos=self.workload.ignore_eos), record)
        return record.text if record.error is None else f"failed: {record.error}"
