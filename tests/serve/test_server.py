"""The OpenAI server that `lvnas serve` starts: models, chat with images, errors that leave the engine up."""

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cases import Case
from PIL import Image

from lvnas.adapters import read_adapter
from lvnas.pack import pack

TEXT = {"type": "text", "text": "what is it?"}
SERVED = ("everything", "text-only", "vision-1")


@pytest.fixture(scope="module")
def packed(checkpoint: Path, adapters: dict[str, Path]) -> Path:
    folder = checkpoint.parent / "pack"
    pack([read_adapter(adapters[name], name) for name in SERVED], folder, base=str(checkpoint))
    return folder


class Server:
    def __init__(self, pack: Path, log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [
            sys.executable,
            "-c",
            "from lvnas.cli import main; main()",
            "serve",
            str(pack),
            "--port",
            str(self.port),
        ]
        flags = ["--max-model-len", "512", "--enforce-eager", "--dtype", "float32", "--max-num-seqs", "8"]
        flags += ["--enable-auto-tool-choice", "--tool-call-parser", "llama3_json"]
        environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        self.log = log.open("w")
        self.process = subprocess.Popen([*command, *flags], stdout=self.log, stderr=self.log, env=environment)
        self._wait(log)

    def _wait(self, log: Path) -> None:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5)
                return
            except OSError:
                assert self.process.poll() is None, log.read_text()[-3000:]
                time.sleep(1)
        raise AssertionError(f"no server after 600 s: {log.read_text()[-3000:]}")

    def get(self, path: str) -> Any:
        return json.loads(urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60).read())

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                text = answer.read().decode()
                return answer.status, text if body.get("stream") else json.loads(text)
        except urllib.error.HTTPError as error:
            answer = json.loads(error.read())
            return error.code, answer.get("error", {}).get("message", answer)

    def chat(self, parts: Any, model: str = "everything", **options: Any) -> tuple[int, Any]:
        messages = parts if parts and "role" in parts[0] else [{"role": "user", "content": parts}]
        body = {"model": model, "messages": messages, "max_tokens": 6, "temperature": 0, **options}
        return self.post("/v1/chat/completions", body)


@pytest.fixture(scope="module")
def server(packed: Path) -> Iterator[Server]:
    server = Server(packed, packed.parent / "server.log")
    yield server
    server.process.terminate()
    server.process.wait(timeout=60)
    server.log.close()


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    import numpy as np

    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def part(image: Image.Image, cut: int | None = None) -> dict[str, Any]:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()[:cut]).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def test_models_lists_the_base_and_each_adapter_with_its_parent(server: Server, checkpoint: Path) -> None:
    models = {model["id"]: model["parent"] for model in server.get("/v1/models")["data"]}
    assert models == {str(checkpoint): None} | dict.fromkeys(SERVED, str(checkpoint))


@pytest.mark.parametrize("adapter", [None, *SERVED])
def test_chat_answers_as_transformers_and_peft(
    server: Server, oracle, checkpoint: Path, adapter: str | None
) -> None:
    first, second = picture(40, 20), picture(90, 28, seed=1)
    messages = [
        {"role": "user", "content": [part(first), TEXT]},
        {"role": "assistant", "content": "a seven"},
        {"role": "user", "content": [{"type": "text", "text": "and "}, part(second), TEXT]},
    ]
    status, answer = server.chat(messages, adapter or str(checkpoint), logprobs=True, return_token_ids=True)
    assert status == 200, answer
    blank = {"type": "image"}
    messages[0]["content"][0] = messages[2]["content"][1] = blank
    text = oracle.processor.apply_chat_template(messages, add_generation_prompt=True)
    case = Case(text, [first, second], adapter)
    ids = answer["choices"][0]["token_ids"]
    wanted = oracle.logprobs(case, ids)
    assert ids == wanted.argmax(-1).tolist()
    logprobs = [entry["logprob"] for entry in answer["choices"][0]["logprobs"]["content"]]
    assert logprobs == pytest.approx(wanted.max(-1).values.tolist(), abs=1e-4)
    assert answer["usage"]["prompt_tokens"] == len(oracle.prompt_ids(case)) + 5 * (2 + 4)


def test_streams_the_same_text(server: Server) -> None:
    parts = [part(picture(40, 20)), TEXT]
    whole = server.chat(parts)[1]["choices"][0]["message"]["content"]
    status, events = server.chat(parts, stream=True)
    chunks = [json.loads(line[6:]) for line in events.splitlines() if line.startswith("data: {")]
    assert status == 200
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks) == whole


def test_a_json_schema_holds_for_an_image(server: Server) -> None:
    choices = {"parity": {"enum": ["even", "odd"]}, "sure": {"type": "boolean"}}
    schema = {
        "type": "object",
        "properties": choices,
        "required": [*choices],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    status, answer = server.chat([part(picture(40, 20)), TEXT], response_format=wanted, max_tokens=200)
    assert status == 200, answer
    found = json.loads(answer["choices"][0]["message"]["content"])
    assert found["parity"] in ("even", "odd") and isinstance(found["sure"], bool) and len(found) == 2


def test_n_answers_and_the_tokens_they_took(server: Server, oracle) -> None:
    status, answer = server.chat(
        [part(picture(40, 20)), TEXT], n=3, temperature=1.0, seed=1, return_token_ids=True, ignore_eos=True
    )
    assert status == 200, answer
    answers = [tuple(choice["token_ids"]) for choice in answer["choices"]]
    assert len(answers) == 3 and len(set(answers)) > 1
    messages = [{"role": "user", "content": [{"type": "image"}, TEXT]}]
    text = oracle.processor.apply_chat_template(messages, add_generation_prompt=True)
    assert answer["usage"]["completion_tokens"] == 3 * 6
    assert answer["usage"]["prompt_tokens"] == len(oracle.prompt_ids(Case(text))) + 5 * 2


def test_a_stop_string_ends_the_answer(server: Server) -> None:
    parts = [part(picture(40, 20)), TEXT]
    whole = server.chat(parts, max_tokens=20)[1]["choices"][0]["message"]["content"]
    stop = whole[8:10]
    status, answer = server.chat(parts, max_tokens=20, stop=[stop])
    assert status == 200 and len(stop) == 2
    choice = answer["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (whole[: whole.index(stop)], "stop")


def test_completions_of_a_text_prompt(server: Server, oracle) -> None:
    case = Case("<|begin_of_text|>two digits", [], "text-only")
    body = {"model": "text-only", "prompt": case.text, "max_tokens": 6, "temperature": 0, "logprobs": 1}
    options = {"add_special_tokens": False, "ignore_eos": True, "return_token_ids": True}
    status, answer = server.post("/v1/completions", {**body, **options})
    assert status == 200, answer
    choice = answer["choices"][0]
    wanted = oracle.logprobs(case, choice["token_ids"])
    assert choice["token_ids"] == wanted.argmax(-1).tolist()
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(wanted.max(-1).values.tolist(), abs=1e-4)
    assert answer["usage"]["prompt_tokens"] == len(oracle.prompt_ids(case))
    status, events = server.post("/v1/completions", {**body, **options, "stream": True})
    chunks = [json.loads(line[6:]) for line in events.splitlines() if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == choice["text"]


def test_tools_reach_the_template_and_a_call_comes_back_parsed(server: Server, oracle) -> None:
    parameters = {"type": "object", "properties": {"digit": {"type": "integer"}}, "required": ["digit"]}
    tools = [{"type": "function", "function": {"name": "look", "description": "?", "parameters": parameters}}]
    call = {"name": "look", "parameters": {"digit": 7}}
    # A random model calls no tool of itself: the schema makes it say one.
    schema = {"type": "json_schema", "json_schema": {"name": "call", "schema": {"const": call}}}
    status, answer = server.chat(
        [part(picture(40, 20)), TEXT], tools=tools, response_format=schema, max_tokens=100
    )
    assert status == 200, answer
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "tool_calls", choice
    function = choice["message"]["tool_calls"][0]["function"]
    assert (function["name"], json.loads(function["arguments"])) == ("look", {"digit": 7})
    messages = [{"role": "user", "content": [{"type": "image"}, TEXT]}]
    text = oracle.processor.apply_chat_template(messages, tools=tools, add_generation_prompt=True)
    assert answer["usage"]["prompt_tokens"] == len(oracle.prompt_ids(Case(text))) + 5 * 2


BAD = {
    "too many images": ([part(picture(9, 9))] * 5 + [TEXT], {}, 400, "At most 4 image"),
    "an image past the pixel limit": (
        [part(Image.new("L", (4097, 4097))), TEXT],
        {},
        400,
        "exceed the maximum",
    ),
    "a truncated image": ([part(picture(64, 64), cut=300), TEXT], {}, 400, "truncated"),
    "not an image": (
        [{"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}}],
        {},
        400,
        "image",
    ),
    "an image from the network": (
        [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/a.png"}}],
        {},
        400,
        "allowed domains",
    ),
    "an image token": ([{"type": "text", "text": "a <|image|> b"}], {}, 400, "no image"),
    "an image token too many": (
        [part(picture(9, 9)), {"type": "text", "text": "<|image|>"}],
        {},
        400,
        "2 image tokens",
    ),
    "text beyond the context": ([{"type": "text", "text": "x" * 600}], {}, 400, "maximum context length"),
    "an unknown adapter": ([TEXT], {"model": "nobody"}, 404, "does not exist"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_requests_are_refused_and_the_engine_stays_up(server: Server, what: str) -> None:
    parts, options, wanted, message = BAD[what]
    status, answer = server.chat(parts, **options)
    assert (status, message in str(answer)) == (wanted, True), answer
    assert server.chat([part(picture(40, 20)), TEXT])[0] == 200


def test_runtime_loading_is_off(server: Server) -> None:
    status, _ = server.post("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "/nowhere"})
    assert status == 404
