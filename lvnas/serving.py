"""How a pack is served: engine settings; for layout `group` also scripts and router configurations.

Router forms: LiteLLM proxy's `model_list` (https://docs.litellm.ai/docs/proxy/configs) and the Kubernetes
Gateway API with the inference extension's InferencePool (https://gateway-api-inference-extension.sigs.k8s.io);
both match on the request's model name, which is the adapter's name.
"""

import json
import shlex
from collections.abc import Iterable
from typing import Any

from lvnas.errors import InputError
from lvnas.hub import HUB

SLOTS = 8
"""Adapters that are resident at once (max_loras) unless the user says otherwise."""
PORT = 8000
ROUTE_MATCHES = 64
"""Matches that the Gateway API allows in one rule."""
PART_TYPES = ("text", "image", "audio", "video", "input", "file", "refusal", "tool", "thinking")
"""vLLM answers a base request that has such a part with the adapter of that name, if there is one."""


def check_names(names: Iterable[str], base: str) -> None:
    """Refuses adapter names under which vLLM would answer the base's own requests with an adapter.

    Raises:
        InputError: the name of a part of a message, or the base's.
    """
    for name in names:
        if name in (*PART_TYPES, base):
            raise InputError(
                f"adapter name {name!r} would take over the base's own requests; not allowed: "
                f"{', '.join(PART_TYPES)} and the base's name; rename it with NAME=FOLDER"
            )


def serve_settings(adapters: list[dict[str, Any]], slots: int | None) -> dict[str, int]:
    """vLLM's LoRA settings for manifest entries: all stay in CPU memory, `slots` of them on the device."""
    return {
        "max_loras": min(slots or SLOTS, len(adapters)),
        "max_lora_rank": max(entry["max_rank"] for entry in adapters),
        "max_cpu_loras": len(adapters),
    }


def groups(adapters: list[dict[str, Any]], slots: int | None) -> list[dict[str, Any]]:
    """One group, that is one engine, for each max_lora_rank that occurs, lowest first."""
    ranks = sorted({entry["max_rank"] for entry in adapters})
    members = {rank: [entry for entry in adapters if entry["max_rank"] == rank] for rank in ranks}
    return [
        {
            "name": f"rank-{rank}",
            "adapters": [entry["name"] for entry in entries],
            "serve": serve_settings(entries, slots),
        }
        for rank, entries in members.items()
    ]


def serving_files(manifest: dict[str, Any]) -> dict[str, str]:
    """File name -> text for `manifest`; nothing unless its layout is `group`."""
    if manifest["layout"] != "group":
        return {}
    paths = {entry["name"]: entry["path"] for entry in manifest["adapters"]}
    scripts = {
        f"{group['name']}.sh": _script(
            manifest["base"], group, {name: paths[name] for name in group["adapters"]}
        )
        for group in manifest["groups"]
    }
    return scripts | {"litellm.yaml": _litellm(manifest), "gateway.yaml": _gateway(manifest)}


def _script(base: str, group: dict[str, Any], paths: dict[str, str]) -> str:
    settings = group["serve"]
    flags = [f"--{key.replace('_', '-')} {value}" for key, value in settings.items()]
    modules = " ".join(shlex.quote(f"{name}={path}") for name, path in paths.items())
    return (
        "#!/bin/sh\n"
        f"# The engine of group {group['name']}; more options of vLLM can follow, such as --port 8001\n"
        'cd "$(dirname "$0")/../.." || exit 1\n'
        f"exec vllm serve {shlex.quote(HUB.get(base, base))} --enable-lora {' '.join(flags)} \\\n"
        f'  --lora-modules {modules} "$@"\n'
    )


def _litellm(manifest: dict[str, Any]) -> str:
    lines = [
        "# litellm --config litellm.yaml; each group's engine is expected at http://<group>:8000",
        "model_list:",
    ]
    for group in manifest["groups"]:
        for name in group["adapters"]:
            lines += [
                f"  - model_name: {json.dumps(name)}",
                "    litellm_params:",
                f"      model: {json.dumps('hosted_vllm/' + name)}",
                f"      api_base: http://{group['name']}:{PORT}/v1",
            ]
    return "\n".join(lines) + "\n"


def _gateway(manifest: dict[str, Any]) -> str:
    documents = []
    for group in manifest["groups"]:
        documents.append(_pool(group["name"]))
        names = group["adapters"]
        for number, start in enumerate(range(0, len(names), ROUTE_MATCHES)):
            route = group["name"] + (f"-{number}" if number else "")
            documents.append(_route(route, group["name"], names[start : start + ROUTE_MATCHES]))
    return "---\n".join(documents)


def _pool(group: str) -> str:
    return f"""apiVersion: inference.networking.k8s.io/v1
kind: InferencePool
metadata:
  name: {group}
spec:
  selector:
    matchLabels:
      lvnas-group: {group}
  targetPorts:
    - number: {PORT}
  endpointPickerRef:
    name: {group}-endpoint-picker
    port:
      number: 9002
"""


def _route(name: str, group: str, adapters: list[str]) -> str:
    matches = "".join(
        f"""        - headers:
            - type: Exact
              name: X-Gateway-Model-Name
              value: {json.dumps(adapter)}
          path:
            type: PathPrefix
            value: /v1
"""
        for adapter in adapters
    )
    return f"""apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata:
  name: {name}
spec:
  parentRefs:
    - name: inference-gateway
  rules:
    - matches:
{matches}      backendRefs:
        - group: inference.networking.k8s.io
          kind: InferencePool
          name: {group}
"""
