"""What the server uses while it is loaded, once a second and on the records' clock: memory of its
processes on the
host, memory of the device (NVML), and its /metrics."""

import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import gevent
import psutil

from lvnas_loadtest.server import listening_processes, scrape

INTERVAL = 1.0
METRIC = re.compile(r"^((?:vllm|lvnas)[:_][a-zA-Z0-9_:]+)(?:\{(.*)\})? (\S+)", re.MULTILINE)
SKIPPED = ("_bucket", "_created", "_sum", "_count")
LABEL = re.compile(r'(\w+)="([^"]*)"')


class Sampler:
    """Samples the servers at `urls`, whose processes are `pids` (found by their port where none are
    given)."""

    def __init__(self, urls: Sequence[str], pids: Sequence[int]) -> None:
        self.urls = list(urls)
        self.pids = list(pids) or [pid for url in urls for pid in listening_processes(url)]
        self.device_bytes = device_reader()
        self.samples: list[dict[str, Any]] = []
        self.errors: list[str] = []

    def start(self) -> None:
        """Begins to sample, until `stop`."""
        self._greenlet = gevent.spawn(self._run)

    def stop(self) -> None:
        """Takes no more samples."""
        self._greenlet.kill()

    def _run(self) -> None:
        threads = gevent.get_hub().threadpool  # real threads, so that no user waits for a slow driver
        while True:
            begin = time.time()
            sample: dict[str, Any] = {"time": begin, "host_bytes": threads.apply(host_bytes, (self.pids,))}
            sample["device_bytes"] = threads.apply(self.device_bytes)
            sample["metrics"] = self._metrics()
            self.samples.append(sample)
            gevent.sleep(max(0.0, begin + INTERVAL - time.time()))

    def _metrics(self) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for url in self.urls:
            try:
                text = scrape(url)
            except OSError as error:
                self.errors.append(f"{url}/metrics: {error}")
                continue
            for name, value in parse(text).items():
                metrics[name] = metrics.get(name, 0.0) + value
        return metrics


def parse(text: str) -> dict[str, float]:
    """The server's own gauges and counters in Prometheus' text format, summed over their labels (engines); of
    vLLM's cache configuration, which is all labels, `kv_tokens`: how many tokens fit in the cache."""
    found: dict[str, float] = {}
    for name, labels, value in METRIC.findall(text):
        if name == "vllm:cache_config_info":
            config = dict(LABEL.findall(labels))
            if config.get("num_gpu_blocks", "").isdigit() and config.get("block_size", "").isdigit():
                tokens = int(config["num_gpu_blocks"]) * int(config["block_size"])
                found["kv_tokens"] = found.get("kv_tokens", 0.0) + tokens
        elif not name.endswith((*SKIPPED, "_info")):
            found[name] = found.get(name, 0.0) + float(value)
    return found


def host_bytes(pids: Sequence[int]) -> int | None:
    """Memory of the processes and their children that is theirs alone: resident pages without mapped files and
    shared memory. None without any process. (The proportional set size would say more, but to read it takes a
    tenth of a second of the server's time.)"""
    processes: dict[int, psutil.Process] = {}
    for pid in pids:
        try:
            parent = psutil.Process(pid)
            processes |= {process.pid: process for process in (parent, *parent.children(recursive=True))}
        except psutil.NoSuchProcess:
            continue
    return sum(map(_bytes, processes.values())) if processes else None


def _bytes(process: psutil.Process) -> int:
    try:
        memory = process.memory_info()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return 0
    return memory.rss - getattr(memory, "shared", 0)


def device_reader() -> Callable[[], int | None]:
    """A function that gives the bytes in use on all NVIDIA devices; None where there is no NVML."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except (ImportError, OSError, RuntimeError):
        return lambda: None
    except pynvml.NVMLError:
        return lambda: None
    handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    return lambda: sum(int(pynvml.nvmlDeviceGetMemoryInfo(handle).used) for handle in handles)
