"""Adapters that come and go during the load, through vLLM's runtime endpoints.

An adapter is loaded again under a new name, its requests move there, and the old name is unloaded: no
request asks for a name that is not served, and the server does all the work of a new adapter.
"""

import itertools
import time
from collections.abc import Callable
from typing import Any

from lvnas.errors import InputError
from lvnas_loadtest.server import post, served_models
from lvnas_loadtest.workload import Workload

DRAIN = 1.0
"""Seconds in which requests for the old name that were just sent can still reach the server."""


class Churn:
    """Replaces one adapter of `workload` at a time.

    Raises:
        InputError: an adapter's folder is not known (only a pack gives them).
    """

    def __init__(self, workload: Workload, move: Callable[[str, str, str], None]) -> None:
        """`move(adapter, url, model)` tells all processes where the adapter's requests go from now on."""
        missing = [adapter for adapter in workload.adapters if adapter not in workload.adapter_paths]
        if missing:
            raise InputError(
                f"churn needs the folders of {', '.join(missing)}; give the --pack that is served"
            )
        self.workload, self.move = workload, move
        self.events: list[dict[str, Any]] = []
        self._turns = itertools.cycle(workload.adapters)
        self._numbers = itertools.count(1)

    def step(self, at: float) -> None:
        """Replaces the next adapter; `at` is noted with how long loading and unloading took."""
        self._replace(next(self._turns), at, next(self._numbers))

    def restore(self, at: float) -> None:
        """Gives every replaced adapter its own name back; what fails is noted in `events`, with `at`.

        A step may have been cut short before it unloaded that name: the server knows what it serves.
        """
        for adapter in self.workload.adapters:
            url, model = self.workload.route(adapter)
            if model == adapter:
                continue
            try:
                if adapter not in served_models(url):
                    self._load(url, adapter, adapter)
                self.move(adapter, url, adapter)
                self._unload(url, model)
            except (OSError, InputError) as error:
                self.events.append({"at": at, "adapter": adapter, "error": f"not restored: {error}"})

    def _replace(self, adapter: str, at: float, number: int) -> None:
        url, old = self.workload.route(adapter)
        new = f"{adapter}~{number}"
        event: dict[str, Any] = {"at": at, "adapter": adapter, "error": None}
        self.events.append(event)
        try:
            event["load_s"] = self._load(url, adapter, new)
            self.move(adapter, url, new)
            time.sleep(DRAIN)
            event["unload_s"] = self._unload(url, old)
        except OSError as error:
            event["error"] = str(error)

    def _load(self, url: str, adapter: str, model: str) -> float:
        began = time.perf_counter()
        post(
            url,
            "/v1/load_lora_adapter",
            {"lora_name": model, "lora_path": self.workload.adapter_paths[adapter]},
        )
        return time.perf_counter() - began

    def _unload(self, url: str, model: str) -> float:
        began = time.perf_counter()
        post(url, "/v1/unload_lora_adapter", {"lora_name": model})
        return time.perf_counter() - began
