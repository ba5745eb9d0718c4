"""Deployments against each other in turns (A B A B ...): the same workload and seeds, ratios per round."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy import stats

from lvnas.errors import InputError
from lvnas.files import provenance, write_json, write_text
from lvnas_loadtest import plan as requests
from lvnas_loadtest.compare_page import comparison_page
from lvnas_loadtest.deployments import Deployment
from lvnas_loadtest.run import run
from lvnas_loadtest.servers import Running, running
from lvnas_loadtest.workload import Workload

CONFIDENCE = 0.95
FIELDS = (
    "output_throughput",
    "request_throughput",
    "median_ttft_ms",
    "p99_ttft_ms",
    "median_tpot_ms",
    "p99_tpot_ms",
    "median_e2el_ms",
    "completed",
    "failed",
)
USAGE = ("host_bytes", "device_bytes", "kv_tokens")
SLOTS = ("adapter_bytes", "adapters_per_gib")
EFFECTS = (
    ("mixed ranks on stock vLLM", "stock-mixed", "stock-64"),
    ("grouped engines", "grouped", "stock-64"),
    ("our operators, equal ranks", "ragged-64", "stock-64"),
    ("mixed ranks on our operators", "ragged-mixed", "ragged-64"),
    ("operators and mixed ranks", "ragged-mixed", "stock-64"),
    ("what adapters cost at all", "ragged-mixed", "base"),
)
"""(what the ratio shows, numerator, denominator)"""


@dataclass(kw_only=True)
class Plan:
    """A comparison: the first workload's server is replaced by each deployment's."""

    deployments: Sequence[Deployment]
    workload: Workload
    rounds: int = 3
    flags: Sequence[str] = ()
    """vLLM's flags, the same for all: here belongs the common memory limit."""
    together: bool = False
    """Start every server once and let them take turns: needs room for all of them at the same time."""


def compare(plan: Plan, out: Path, progress: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Runs all turns and writes `compare.json`, `compare.md`, `compare.html` and each run's report below `out`.

    Returns:
        {"rounds": {deployment: [numbers per round]}, "ratios": [...], "errors": {...}, "workload", "provenance"}

    Raises:
        InputError: fewer than one round; a bad trace; no deployment finished a round.
    """
    if plan.rounds < 1 or not plan.deployments:
        raise InputError(f"{plan.rounds} rounds of {len(plan.deployments)} deployments; at least one of each")
    requests.Plan(plan.workload)  # a bad trace is said before the first server is started
    rounds: dict[str, list[dict[str, Any]]] = {deployment.name: [] for deployment in plan.deployments}
    errors: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        kept: dict[str, Running] = {}
        for deployment in plan.deployments if plan.together else ():
            progress(f"starting {deployment.name}")
            with _noted(deployment, errors):
                server = running(deployment, plan.flags, out / "runs" / f"{deployment.name}-logs")
                kept[deployment.name] = stack.enter_context(server)
        for number in range(plan.rounds):
            for deployment in plan.deployments:
                if deployment.name in errors:
                    continue
                progress(f"round {number + 1} of {plan.rounds}: {deployment.name}")
                folder = out / "runs" / f"{deployment.name}-{number + 1}"
                with _noted(deployment, errors):
                    found = turn(plan, deployment, number, folder, kept.get(deployment.name))
                    rounds[deployment.name].append(found)
    if not any(rounds.values()):
        raise InputError(f"no deployment finished: {'; '.join(f'{k}: {v}' for k, v in errors.items())}")
    comparison = {
        "rounds": rounds,
        "ratios": ratios(rounds),
        "errors": errors,
        "workload": dataclasses.asdict(plan.workload),
        "flags": list(plan.flags),
        "together": plan.together,
        "provenance": provenance(seeds=[plan.workload.seed + number for number in range(plan.rounds)]),
    }
    page = comparison_page(comparison)
    write_json(out / "compare.json", comparison)
    write_text(out / "compare.md", page.markdown())
    write_text(out / "compare.html", page.html())
    return comparison


@contextlib.contextmanager
def _noted(deployment: Deployment, errors: dict[str, str]) -> Iterator[None]:
    """One deployment that cannot start says something too; the others are still worth measuring."""
    try:
        yield
    except InputError as error:
        errors[deployment.name] = str(error)


def turn(
    plan: Plan, deployment: Deployment, number: int, folder: Path, server: Running | None = None
) -> dict[str, Any]:
    """Loads `deployment`'s `server`, or one that is started for this turn; the numbers of the turn."""
    logs = folder.with_name(f"{folder.name}-logs")
    with contextlib.nullcontext(server) if server else running(deployment, plan.flags, logs) as server:
        workload = turn_workload(plan.workload, deployment, server, number)
        found = numbers(run(workload, folder)) | {"start_seconds": server.start_seconds}
    size, slots = deployment.adapter_bytes, deployment.slots
    return found | {
        "adapter_bytes": size,
        "adapters_per_gib": slots * 2**30 / size if size and slots else None,
    }


def turn_workload(workload: Workload, deployment: Deployment, server: Running, number: int) -> Workload:
    """The comparison's workload for one server; the seed changes with the round, not with the deployment."""
    missing = [adapter for adapter in workload.adapters if adapter not in server.routes]
    if missing:
        raise InputError(f"deployment {deployment.name} does not serve {', '.join(missing)}")
    return dataclasses.replace(
        workload,
        url=next(iter(server.routes.values()))[0],
        routes={adapter: server.routes[adapter] for adapter in workload.adapters},
        rank_classes=deployment.rank_classes,
        slots=deployment.slots,
        server_pids=server.pids,
        seed=workload.seed + number,
    )


def numbers(result: Mapping[str, Any]) -> dict[str, Any]:
    """What a comparison keeps of one run's result."""
    series = result["server"]["series"]
    kept = {name: result[name] for name in FIELDS}
    kept |= {name: series[name]["max"] if name in series else None for name in USAGE}
    kept["saturated"] = result["generator"]["saturated"]
    kept["wrong_adapter"] = result["canary"]["wrong"] if result["canary"] else None
    return kept


def ratios(rounds: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """The effects whose two deployments ran; without any, each deployment against the first."""
    names = [name for name in rounds if rounds[name]]
    pairs = [effect for effect in EFFECTS if effect[1] in names and effect[2] in names]
    pairs = pairs or [(f"{name} against {names[0]}", name, names[0]) for name in names[1:]]
    return [
        {
            "effect": effect,
            "of": of,
            "to": to,
            "ratios": {name: ratio(rounds[of], rounds[to], name) for name in (*FIELDS[:7], *USAGE, *SLOTS)},
        }
        for effect, of, to in pairs
    ]


def ratio(
    ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]], name: str
) -> dict[str, float] | None:
    """The geometric mean over rounds of ours / theirs, with its 95% confidence interval (Student's t on the
    logarithms, so `low` and `high` only from two rounds on); None where a number is missing."""
    pairs = [(a[name], b[name]) for a, b in zip(ours, theirs, strict=False)]
    logs = [math.log(a / b) for a, b in pairs if a and b]
    if not logs:
        return None
    mean = sum(logs) / len(logs)
    found = {"ratio": math.exp(mean), "rounds": len(logs)}
    if len(logs) > 1:
        error = math.sqrt(sum((log - mean) ** 2 for log in logs) / (len(logs) - 1) / len(logs))
        half = error * float(stats.t.ppf((1 + CONFIDENCE) / 2, len(logs) - 1))
        found |= {"low": math.exp(mean - half), "high": math.exp(mean + half)}
    return found
