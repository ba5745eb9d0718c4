"""How many adapters fit on a server at once within a limit of memory: it is started with more and more."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lvnas.errors import InputError
from lvnas.files import provenance, write_json
from lvnas.sources import find_adapters
from lvnas_loadtest.capacity import search
from lvnas_loadtest.deployments import deployments
from lvnas_loadtest.prompts import chat_body
from lvnas_loadtest.records import Record
from lvnas_loadtest.sampler import device_reader, host_bytes
from lvnas_loadtest.servers import running
from lvnas_loadtest.sse import connect, stream_chat


def resident_capacity(
    name: str,
    adapters: Sequence[str],
    out: Path,
    *,
    limit_bytes: int | None,
    highest: int = 64,
    flags: Sequence[str] = (),
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """The most adapters that deployment `name` keeps resident: it starts, answers for each of them, and uses no
    more than `limit_bytes` (of the device where there is one, else of the host; None leaves it to the engine).

    The given adapters are served again and again under new names until there are enough.

    Returns:
        {"adapters": number, "tries": [{"adapters", "fits", "host_bytes", "device_bytes", "error"}], ...}

    Raises:
        InputError: no adapters, or `highest` below 1.
    """
    if highest < 1:
        raise InputError(f"highest {highest} must be at least 1")
    if not adapters:
        raise InputError("no adapters to serve; give some with --mixed or --uniform")
    adapters = [str(adapter.folder.resolve()) for adapter in find_adapters(adapters)]
    tries: list[dict[str, Any]] = []

    def fits(count: float) -> bool:
        number = int(count)
        if number < 1:
            return False
        known = [one for one in tries if one["adapters"] == number]
        if known:
            return bool(known[0]["fits"])
        progress(f"{number} adapters")
        tries.append(_try(name, adapters, number, out / f"{number}-adapters", limit_bytes, flags))
        return bool(tries[-1]["fits"])

    # Whole numbers: a tolerance of less than one adapter in `highest`.
    found = int(search(1.0, 0.9 / highest, fits, float(highest)))
    result = {
        "deployment": name,
        "adapters": found,
        "limit_bytes": limit_bytes,
        "tries": tries,
        "flags": list(flags),
    }
    write_json(out / "resident.json", result | {"provenance": provenance()})
    return result


def _try(
    name: str, adapters: Sequence[str], number: int, out: Path, limit_bytes: int | None, flags: Sequence[str]
) -> dict[str, Any]:
    sources = [f"copy{index}={adapters[index % len(adapters)]}" for index in range(number)]
    tried: dict[str, Any] = {"adapters": number, "fits": False, "error": None}
    try:
        [deployment] = deployments([name], sources, sources, out / "packs", slots=number)
        with running(deployment, flags, out / "logs") as server:
            for url, model in server.routes.values():
                _ask(url, model)
            tried |= {"host_bytes": host_bytes(server.pids), "device_bytes": device_reader()()}
    except (InputError, OSError) as error:
        return tried | {"error": str(error)}
    finally:
        shutil.rmtree(out / "packs", ignore_errors=True)  # a copy of every adapter
    used = tried["device_bytes"] if tried["device_bytes"] is not None else tried["host_bytes"]
    return tried | {"fits": limit_bytes is None or used <= limit_bytes}


def _ask(url: str, model: str) -> None:
    record, client = Record(adapter=model), connect(url, 1, 600.0)
    stream_chat(client, chat_body(model, [{"type": "text", "text": "hello"}], 2, ignore_eos=True), record)
    client.close()
    if record.error:
        raise InputError(f"{model} did not answer: {record.error}")
