"""An OpenAI-compatible server that answers from a script, with known delays: the truth for the timing tests.

Run as its own process: `python scripted_server.py SCRIPT LOG`; prints its port. SCRIPT is JSON,
{model: {"ttft": [seconds, ...], "gap": [seconds, ...], "fault": str, "answer": str}}, delays used in turn.
"""

import asyncio
import itertools
import json
import re
import sys
import time
from pathlib import Path

CHUNK = "data: {}\n\n"


class Server:
    def __init__(self, script: dict, log: Path) -> None:
        self.script, self.log = script, log.open("a", buffering=1)
        self.turns = {name: itertools.count() for name in script}
        self.loaded = {name for name, model in script.items() if not model.get("unloaded")}
        self.running = 0
        self.one_at_a_time = asyncio.Lock()

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := (await reader.readuntil(b"\r\n\r\n")).decode():
                length = re.search(r"content-length: (\d+)", head.lower())
                body = await reader.readexactly(int(length[1]) if length else 0)
                path = head.split(" ", 2)[1]
                await self.answer(path, json.loads(body or b"{}"), writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def answer(self, path: str, body: dict, writer: asyncio.StreamWriter) -> None:
        if path == "/v1/models":
            parents = {name: self.script.get(name, {}).get("parent") for name in sorted(self.loaded)}
            self.whole(
                writer, 200, {"data": [{"id": id, "parent": parent} for id, parent in parents.items()]}
            )
        elif path == "/metrics":
            lines = ['vllm:kv_cache_usage_perc{engine="0"} 0.25', f"vllm:num_requests_running {self.running}"]
            self.whole(writer, 200, "\n".join([*lines, "vllm:num_requests_waiting 0.0", "other_total 7", ""]))
        elif path == "/v1/chat/completions":
            await self.chat(body, writer)
        elif path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
            name = body["lora_name"]
            unload = "unload" in path
            refused = self.script.get(name, {}).get("fault") == "no load"
            if (name in self.loaded) != unload or (refused and not unload):  # as vLLM does
                words = f"The lora adapter '{name}' has {'not' if unload else 'already'} been loaded."
                return self.whole(writer, 400, {"error": {"message": words}})
            (self.loaded.discard if unload else self.loaded.add)(name)
            self.log.write(
                json.dumps({"path": path, "model": name, "lora_path": body.get("lora_path")}) + "\n"
            )
            self.whole(writer, 200, "Success")
        else:
            self.whole(writer, 404, {"error": {"message": f"no {path}"}})
        await writer.drain()

    def whole(self, writer: asyncio.StreamWriter, status: int, body: object) -> None:
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)

    async def chat(self, body: dict, writer: asyncio.StreamWriter) -> None:
        received = time.monotonic()
        name = body["model"]
        if name not in self.loaded:
            return self.whole(writer, 404, {"error": {"message": f"The model `{name}` does not exist."}})
        model, turn = self.script[name], next(self.turns[name])
        fault = model.get("fault")
        if fault == "http 500":
            return self.whole(writer, 500, {"error": {"message": "out of slots"}})
        self.running += 1
        ttft = model["ttft"][turn % len(model["ttft"])]
        words = model.get("answer", "w").split(" ")
        if "later_answer" in model and turn >= model["later_from"]:
            words = model["later_answer"].split(" ")
        count = body.get("max_tokens") or body["max_completion_tokens"]
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        role = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}
        if not model.get("late_role"):
            self.event(writer, role)
            writer.write(self.chunk(b": ping\n\n"))
        if model.get("serial"):
            async with self.one_at_a_time:
                await asyncio.sleep(ttft)
            ttft = 0.0
        due, sent = received + ttft, []
        for token in range(count):
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            sent.append(time.monotonic())
            if fault == "truncate" and token == 2:
                self.running -= 1
                return writer.close()
            if fault == "error event" and token == 2:
                self.event(writer, {"error": {"message": "engine died", "code": 500}})
                break
            if fault == "bad json" and token == 2:
                writer.write(self.chunk(b"data: {nonsense\n\n"))
                break
            text = words[token % len(words)] + " "
            last = {"finish_reason": "length"} if token == count - 1 else {}
            event = CHUNK.format(
                json.dumps({"choices": [{"index": 0, "delta": {"content": text}, **last}]})
            ).encode()
            if model.get("split"):  # half an event now, the rest a moment later: only then is the token there
                writer.write(self.chunk(event[: len(event) // 2]))
                await asyncio.sleep(0.005)
                event = event[len(event) // 2 :]
            sent[-1] = time.monotonic()
            if token == 0 and model.get("late_role"):
                self.event(writer, role)
            writer.write(self.chunk(event))
            due += model["gap"][(turn * count + token) % len(model["gap"])]
        if fault != "no usage":
            self.event(writer, {"choices": [], "usage": {"prompt_tokens": 11, "completion_tokens": count}})
        images = sum(part["type"] == "image_url" for part in body["messages"][0]["content"])
        text = "".join(part.get("text", "") for part in body["messages"][0]["content"])
        seen = {"model": name, "received": received, "sent": sent, "images": images, "text": text}
        seen |= {"max_tokens": count, "ignore_eos": body.get("ignore_eos", False)}
        self.log.write(json.dumps(seen) + "\n")
        self.running -= 1
        writer.write(
            self.chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"
        )  # last: whoever has it finds the log written

    def event(self, writer: asyncio.StreamWriter, value: dict) -> None:
        writer.write(self.chunk(CHUNK.format(json.dumps(value)).encode()))

    def chunk(self, data: bytes) -> bytes:
        return b"%x\r\n%s\r\n" % (len(data), data)


async def main() -> None:
    script, log = sys.argv[1:]
    server = Server(json.loads(Path(script).read_text()), Path(log))
    listening = await asyncio.start_server(server.connection, "127.0.0.1", 0, limit=2**24)
    print(listening.sockets[0].getsockname()[1], flush=True)
    await listening.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
