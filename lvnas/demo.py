"""`lvnas demo`: the whole path on the embedded base and tasks, through the same commands that a user types."""

import base64
import io
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from lvnas import tasks
from lvnas.errors import InputError
from lvnas.tasks.metrics import METRICS

TASKS = ("codewords", "inverted", "largest")
"""They need different parts of the model: new words, a new picture style, and reasoning over the picture."""
KINDS = ("searched", "uniform")
UNIFORM = 64
RATIO = 2.6
"""Fewer LoRA parameters than uniform 64, as in the paper's Table 1."""
READY_SECONDS = 300


@dataclass(kw_only=True, slots=True)
class DemoConfig:
    """What the demo runs."""

    out: Path
    """Folder of everything it makes; a second run keeps what is there."""
    tasks: Sequence[str] = TASKS
    search_steps: int = 40
    """Mini-batches of the search (the paper's DARTS mode)."""
    steps: int = 400
    """Fine-tuning steps per adapter."""
    learning_rate: float = 2e-3
    """Of the fine-tuning."""
    users: int = 4
    """Concurrent users of the load test."""
    duration: str = "20s"
    """Length of the load test."""


def demo(config: DemoConfig) -> dict[str, Any]:
    """Searches, derives, fine-tunes, evaluates, packs, serves and load-tests; prints what it does and finds.

    Returns:
        Seconds of each stage and in all, and the highest memory of this process and its children in bytes.
    """
    out = config.out
    with _peak_memory() as peak:
        seconds: dict[str, float] = {}
        with _stage("base", seconds):
            _verb(["bases"], None)
            from lvnas.bases import resolve

            print(f"tiny: {resolve('tiny')}")
        with _stage("search", seconds):
            for task in config.tasks:
                _search(config, task)
        with _stage("derive and fine-tune", seconds):
            for task in config.tasks:
                for kind in KINDS:
                    _train(config, task, kind)
        adapters = [out / "adapters" / f"{task}-{kind}" for task in config.tasks for kind in KINDS]
        with _stage("evaluate and report", seconds):
            _evaluate(out, adapters)
        with _stage("pack", seconds):
            pack = out / "pack"
            _verb(
                ["pack", *map(str, adapters), "--layout", "pad", "--out", str(pack)], pack / "manifest.json"
            )
        with _stage("serve and ask", seconds), _server(pack, out / "server.log") as url:
            models = _served_models(url)
            print("served models: " + ", ".join(models))
            answers = [_ask(url, adapter.name, out / "images") for adapter in adapters]
            with _stage("load test", seconds):
                load = ["--users", str(config.users), "--duration", config.duration, "--warmup", "5s"]
                load += ["--allow-saturated"]  # two cores run the server and its load; the report says so
                _verb(["loadtest", url, "--pack", str(pack), *load, "--out", str(out / "loadtest")], None)
    total = sum(value for name, value in seconds.items() if name != "load test")
    summary = {"seconds": seconds | {"total": total}, "peak_memory_bytes": peak(), "answers": answers}
    print(
        f"\ndone in {total / 60:.1f} minutes, peak memory {peak() / 2**30:.1f} GiB; everything is in {out}; "
        f"rank maps: {out / 'report'}; load-test page: {out / 'loadtest' / 'report.html'}"
    )
    return summary


def _search(config: DemoConfig, task: str) -> None:
    for kind, options in (
        ("searched", ["--method", "darts", "--ratio", str(RATIO), "--steps", str(config.search_steps)]),
        ("uniform", ["--method", "uniform", "--like-uniform", str(UNIFORM)]),
    ):
        folder = config.out / "search" / f"{task}-{kind}"
        _verb(["search", task, "--base", "tiny", *options, "--out", str(folder)], folder / "ranks.json")


def _train(config: DemoConfig, task: str, kind: str) -> None:
    name = f"{task}-{kind}"
    ranks = config.out / "search" / name / "ranks.json"
    derived, adapter = config.out / "derived" / name, config.out / "adapters" / name
    _verb(["derive", str(ranks), "--out", str(derived)], derived)
    training = ["--steps", str(config.steps), "--learning-rate", str(config.learning_rate)]
    _verb(
        ["finetune", str(derived), task, *training, "--out", str(adapter)],
        adapter / "lvnas.json",
    )


def _evaluate(out: Path, adapters: Sequence[Path]) -> None:
    results = out / "results" / "results.json"
    kept = results.exists()
    _verb(["evaluate", *map(str, adapters), "--out", str(results.parent)], results)
    if kept:
        from lvnas.report import read_results
        from lvnas.tables import print_results

        print_results(read_results(results))
    searched = [str(adapter) for adapter in adapters if adapter.name.endswith("searched")]
    _verb(["report", *searched, str(results), "--out", str(out / "report")], out / "report" / "table.md")


def _verb(arguments: list[str], made: Path | None) -> None:
    """Prints `$ lvnas ...` and runs it in this process; where its result `made` is there already, says so."""
    line = f"$ lvnas {shlex.join(arguments)}"
    if made is not None and made.exists():
        print(f"{line}   # kept: {made} is there from an earlier run", flush=True)
        return
    print(line, flush=True)
    from lvnas.cli import lvnas

    lvnas.main(args=arguments, prog_name="lvnas", standalone_mode=False)


@contextmanager
def _stage(name: str, seconds: dict[str, float]) -> Iterator[None]:
    print(f"\n== {name} ==", flush=True)
    started = time.monotonic()
    yield
    seconds[name] = time.monotonic() - started
    print(f"({name}: {seconds[name]:.0f} s)", flush=True)


@contextmanager
def _server(pack: Path, log: Path) -> Iterator[str]:
    """`lvnas serve PACK` on a free port, ready; stopped at the end. Its output goes to `log`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    arguments = ["serve", str(pack), "--port", str(port), "--max-model-len", "1024"]
    print(f"$ lvnas {shlex.join(arguments)}   # log: {log}", flush=True)
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "lvnas", *arguments],
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait_ready(url, process, log)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait_ready(url: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            last = log.read_text().strip().splitlines()[-1:]
            raise InputError(
                f"the server ended with code {process.returncode}: {''.join(last)} (all of it: {log})"
            )
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise InputError(f"the server was not ready after {READY_SECONDS} s; its log: {log}")


def _served_models(url: str) -> list[str]:
    with urllib.request.urlopen(f"{url}/v1/models", timeout=30) as reply:
        return [model["id"] for model in json.load(reply)["data"]]


def _ask(url: str, model: str, folder: Path) -> dict[str, Any]:
    """Asks `model` the first test question of its task; keeps the image, enlarged, in `folder`."""
    task = tasks.load_task(model.rpartition("-")[0], {"train": 0, "search": 0, "test": 1})
    example = task.splits["test"][0]
    (image,) = example.images
    folder.mkdir(parents=True, exist_ok=True)
    image.resize((image.width * 8, image.height * 8), 0).save(folder / f"{model}.png")
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    picture = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": example.user}]
    question = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": 32,
    }
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(question).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as reply:
        answer = json.load(reply)["choices"][0]["message"]["content"].strip()
    right = METRICS[task.metric](answer, example.assistant) == 1
    print(
        f"{model}: {example.user} -> {answer!r} ({'right' if right else f'wrong, it is {example.assistant!r}'})"
    )
    return {"model": model, "question": example.user, "answer": answer, "truth": example.assistant}


@contextmanager
def _peak_memory() -> Iterator[Callable[[], int]]:
    """Samples the memory (proportional set size) of this process and all its children; yields its highest sum."""
    stop, peak = threading.Event(), [0]

    def sample() -> None:
        me = psutil.Process()
        while not stop.wait(1.0):
            total = 0
            for process in (me, *me.children(recursive=True)):
                try:
                    total += process.memory_full_info().pss
                except psutil.Error:
                    continue
            peak[0] = max(peak[0], total)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield lambda: peak[0]
    finally:
        stop.set()
        thread.join()
