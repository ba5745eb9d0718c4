"""A workload from the options of the command line."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lvnas_loadtest import specs
from lvnas_loadtest.packs import Pack, read_pack
from lvnas_loadtest.server import served_adapters
from lvnas_loadtest.workload import Workload

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
