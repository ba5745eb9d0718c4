"""One streamed chat request: sent, read line by line as the bytes arrive, each token timed.

Locust's own clients cannot do this: its OpenAI user reads the whole body first, and its FastHttpUser reads
blocks of a fixed size, which holds tokens back until a block is full.
"""

import json
import time
from collections.abc import Iterator
from typing import Any

from geventhttpclient import HTTPClient
from geventhttpclient.response import HTTPSocketPoolResponse

from lvnas_loadtest.records import Record
from lvnas_loadtest.server import headers

PATH = "/v1/chat/completions"
TOKEN_FIELDS = ("content", "reasoning_content", "reasoning", "tool_calls", "refusal")


class StreamError(Exception):
    """The server did not give a whole answer; the message says what it gave."""


def connect(url: str, concurrency: int, timeout: float) -> HTTPClient:
    """A pool of kept-alive connections to `url`."""
    return HTTPClient.from_url(
        url, concurrency=concurrency, network_timeout=timeout, connection_timeout=timeout
    )


def stream_chat(client: HTTPClient, body: bytes, record: Record) -> None:
    """Sends `body` and fills `record` in place: times, counts, text, or the error.

    The first token is the first chunk that carries one: a chunk that only announces the role is none. An
    empty `content` without a role counts, since a token may have no text (half a character, a special token).
    """
    record.start = time.time()
    began = last = time.perf_counter()
    try:
        response = client.request("POST", PATH, body, headers())
        try:
            if response.status_code != 200:
                raise StreamError(f"HTTP {response.status_code}: {_reason(response)}")
            for chunk in events(response):
                now = time.perf_counter()
                if carries_token(chunk):
                    if record.ttft is None:
                        record.ttft = now - began
                    else:
                        record.itl.append(now - last)
                    last = now
                _take(chunk, record)
        finally:
            response.release()
        if record.ttft is None:
            raise StreamError("the stream ended without a token")
        if record.finish_reason is None:
            raise StreamError("the stream broke off before its finish_reason")
        record.latency = last - began
    # Every failure of a request, the network's and the server's, is a result of the test.
    except Exception as error:
        record.error = f"{type(error).__name__}: {error}"[:500]
        record.latency = time.perf_counter() - began
    if not record.counted:
        record.output_tokens = len(record.itl) + (record.ttft is not None)


def events(response: HTTPSocketPoolResponse) -> Iterator[dict[str, Any]]:
    """The JSON objects of a server-sent-event stream as they arrive, up to `[DONE]` or the end.

    Raises:
        StreamError: an event is no JSON object, or reports an error.
    """
    while line := response.readline(b"\n"):
        if not line.startswith(b"data:"):
            continue  # comments (pings), event names, the empty line between events
        data = line[len(b"data:") :].strip()
        if data == b"[DONE]":
            response.read()
            return
        try:
            event = json.loads(data)
        except ValueError:
            raise StreamError(f"an event is not JSON: {data[:200]!r}") from None
        if not isinstance(event, dict):
            raise StreamError(f"an event is not an object: {data[:200]!r}")
        if "error" in event:
            raise StreamError(f"the server reports: {event['error']}")
        yield event


def carries_token(chunk: dict[str, Any]) -> bool:
    """Whether a chunk of a chat stream brings a token, not only the role, the end or the counts."""
    for choice in chunk.get("choices") or ():
        delta = choice.get("delta") or {}
        if any(delta.get(name) for name in TOKEN_FIELDS):
            return True
        if "role" not in delta and delta.get("content") == "":
            return True
    return False


def _take(chunk: dict[str, Any], record: Record) -> None:
    for choice in chunk.get("choices") or ():
        record.text += (choice.get("delta") or {}).get("content") or ""
        record.finish_reason = choice.get("finish_reason") or record.finish_reason
    if usage := chunk.get("usage"):
        record.prompt_tokens, record.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
        record.counted = True


def _reason(response: HTTPSocketPoolResponse) -> str:
    body = response.read().decode(errors="replace")
    try:
        return json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return body[:300]
