"""Questions to a server that are no load: its models, its metrics, its processes, its runtime adapters."""

import ipaddress
import json
import os
import socket
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from typing import Any

import psutil

from lvnas.errors import InputError
from lvnas_loadtest.workload import Workload, normal_url

TIMEOUT = 30.0
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy would be in the measurement


def headers() -> dict[str, str]:
    """The headers of every request; the key comes from OPENAI_API_KEY, as for other OpenAI clients."""
    key = os.environ.get("OPENAI_API_KEY")
    return {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})


def served_models(url: str) -> list[str]:
    """The names of the models that `url` serves, as it lists them.

    Raises:
        InputError: nothing answers there, or it does not answer like an OpenAI-compatible server.
    """
    return [model["id"] for model in _models(url)]


def served_adapters(url: str) -> list[str]:
    """The served LoRA adapters (vLLM names each one's base as its parent); all models where none is one.

    Raises:
        InputError: as `served_models`.
    """
    models = _models(url)
    return [model["id"] for model in models if model.get("parent")] or [model["id"] for model in models]


def check_models(workload: Workload) -> None:
    """Sees that each adapter's server has its model.

    Raises:
        InputError: a model is not served, or a server does not answer.
    """
    for url in {workload.route(adapter)[0] for adapter in workload.adapters}:
        check_url_models(
            url, [model for address, model in map(workload.route, workload.adapters) if address == url]
        )


def check_url_models(url: str, labels: Sequence[str]) -> list[str]:
    """`labels` if `url` serves them all; without labels, the adapters that it serves.

    Raises:
        InputError: a label is not served, or nothing answers.
    """
    served = served_models(url)
    missing = [label for label in labels if label not in served]
    if missing:
        raise InputError(f"{url} serves no model {', '.join(missing)}; it serves {', '.join(served)}")
    return list(labels) or served_adapters(url)


def post(url: str, path: str, body: dict[str, Any]) -> str:
    """The answer to a JSON request.

    Raises:
        OSError: no connection, or a status that is no success, with what the server says.
    """
    request = urllib.request.Request(normal_url(url) + path, json.dumps(body).encode(), headers())
    try:
        with _opener.open(request, timeout=TIMEOUT) as answer:
            return answer.read().decode()
    except urllib.error.HTTPError as error:
        raise OSError(f"{error}: {error.read(2000).decode(errors='replace')}") from None


def scrape(url: str) -> str:
    """The text of /metrics.

    Raises:
        OSError: no connection, or the server has none.
    """
    with _opener.open(normal_url(url) + "/metrics", timeout=TIMEOUT) as answer:
        return answer.read().decode()


def listening_processes(url: str) -> list[int]:
    """The processes on this machine that listen on the port of `url`; none where it is not this machine's."""
    parts = urllib.parse.urlsplit(normal_url(url))
    try:
        if not ipaddress.ip_address(socket.gethostbyname(parts.hostname or "")).is_loopback:
            return []
        connections = psutil.net_connections("tcp")
    except (OSError, psutil.AccessDenied):
        return []
    port = parts.port or (443 if parts.scheme == "https" else 80)
    listening = (
        item for item in connections if item.status == psutil.CONN_LISTEN and item.laddr.port == port
    )
    return sorted({item.pid for item in listening if item.pid})


def _models(url: str) -> list[dict[str, Any]]:
    address = normal_url(url) + "/v1/models"
    try:
        with _opener.open(urllib.request.Request(address, headers=headers()), timeout=TIMEOUT) as answer:
            return [model for model in json.load(answer)["data"] if isinstance(model["id"], str)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"no OpenAI-compatible server answers at {address}: {error}") from None
