"""A workload from the options of the command line."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvnas.errors import InputError
from lvnas_loadtest import specs
from lvnas_loadtest.packs import Pack, read_pack
from lvnas_loadtest.server import served_adapters
from lvnas_loadtest.workload import Workload

if TYPE_CHECKING:
    from lvnas_loadtest.deployments import Deployment

DURATIONS = ("duration", "warmup", "timeout", "churn", "canary_every")


def make_workload(url: str, pack: Path | None, models: str | None, options: Mapping[str, Any]) -> Workload:
    """The workload for `url` whose adapters come from `models` (names with commas), `pack`, or the
    server's list.

    Raises:
        InputError: an option out of range, no pack, no server.
    """
    known = read_pack(pack) if pack else Pack([], {}, None, {})
    names = [name.strip() for name in models.split(",") if name.strip()] if models else known.adapters
    values = dict(options)
    values |= {name: specs.seconds(values[name]) for name in DURATIONS if name in values}
    values["slo"] = specs.limits(values.pop("goodput", ()))
    return Workload(
        url=url,
        adapters=names or served_adapters(url),
        rank_classes=known.rank_classes,
        slots=known.slots,
        adapter_paths=known.paths,
        **values,
    )


def labels(deployments: Sequence["Deployment"]) -> list[str]:
    """The names that every deployment serves, in the first one's order.

    Raises:
        InputError: there is none.
    """
    served = [
        [label for engine in deployment.engines for label in engine.models] for deployment in deployments
    ]
    common = [label for label in served[0] if all(label in names for names in served)]
    if not common:
        raise InputError(f"no adapter is served by all of {', '.join(one.name for one in deployments)}")
    return common
