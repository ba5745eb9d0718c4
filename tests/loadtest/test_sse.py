"""What counts as a token, and every way a stream can fail, over real sockets."""

import json

import pytest

from lvnas_loadtest.prompts import chat_body
from lvnas_loadtest.records import Record
from lvnas_loadtest.sse import carries_token, connect, stream_chat


def ask(url: str, model: str, tokens: int = 4) -> Record:
    record = Record(adapter=model)
    client = connect(url, 1, 5.0)
    stream_chat(
        client, chat_body(model, [{"type": "text", "text": "hello"}], tokens, ignore_eos=True), record
    )
    client.close()
    return record


@pytest.mark.parametrize(
    ("choices", "expected"),
    [
        ([{"delta": {"role": "assistant", "content": ""}}], False),
        ([{"delta": {"role": "assistant"}}], False),
        ([{"delta": {"role": "assistant", "content": "Hi"}}], True),
        ([{"delta": {"content": "x"}}], True),
        ([{"delta": {"content": ""}}], True),  # a token without text, as half a character
        ([{"delta": {"reasoning_content": "hm"}}], True),
        ([{"delta": {"tool_calls": [{"index": 0}]}}], True),
        ([{"delta": {}, "finish_reason": "stop"}], False),
        ([{"delta": {"content": None}}], False),
        ([], False),
        (None, False),
    ],
)
def test_carries_token(choices, expected):
    assert carries_token({"choices": choices}) is expected


def test_whole_answer(serve):
    server = serve({"a": {"ttft": [0.05], "gap": [0.02], "answer": "one two"}})
    record = ask(server.url, "a")
    assert record.error is None and record.text == "one two one two " and record.finish_reason == "length"
    assert (record.prompt_tokens, record.output_tokens, record.counted) == (11, 4, True)
    assert len(record.itl) == 3 and record.latency == pytest.approx(record.ttft + sum(record.itl))
    assert record.tpot == pytest.approx((record.latency - record.ttft) / 3)
    [seen] = server.requests()
    assert seen["ignore_eos"] and seen["max_tokens"] == 4


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("http 500", "HTTP 500: out of slots"),
        ("truncate", "Incomplete"),
        ("error event", "engine died"),
        ("bad json", "an event is not JSON: b'{nonsense'"),
    ],
)
def test_failures_are_named(serve, fault, words):
    record = ask(serve({"a": {"ttft": [0.01], "gap": [0.01], "fault": fault}}).url, "a")
    assert words in (record.error or "")
    assert record.latency > 0


def test_unknown_model_and_no_server(serve):
    server = serve({"a": {"ttft": [0.01], "gap": [0.01]}})
    assert "HTTP 404: The model `b` does not exist." in (ask(server.url, "b").error or "")
    assert "refused" in (ask("http://127.0.0.1:9", "a").error or "")


def test_chunks_are_counted_where_the_server_counts_nothing(serve):
    record = ask(serve({"a": {"ttft": [0.01], "gap": [0.01], "fault": "no usage"}}).url, "a", 5)
    assert record.error is None and record.output_tokens == 5 and not record.counted


def test_body_asks_for_counts_and_greedy_answers():
    body = json.loads(chat_body("m", [], 3, ignore_eos=False))
    assert body["stream"] and body["stream_options"] == {"include_usage": True} and body["temperature"] == 0
    assert "ignore_eos" not in body
