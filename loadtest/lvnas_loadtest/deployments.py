"""Ways to serve the same adapters, by name: the base alone, stock vLLM, grouped by rank, ragged; or a running server.

`stock-64` and `ragged-64` serve the uniform adapters, the others the mixed-rank ones; adapters with the same place
in both lists share a name in the load, so that every deployment gets the same requests.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lvnas.errors import InputError, unknown
from lvnas_loadtest.packs import read_pack
from lvnas_loadtest.server import check_url_models
from lvnas_loadtest.workload import normal_url

if TYPE_CHECKING:
    from lvnas.adapters import Adapter

KINDS = {
    "base": (None, None),
    "stock-64": ("uniform", "pad"),
    "stock-mixed": ("mixed", "pad"),
    "grouped": ("mixed", "group"),
    "ragged-64": ("uniform", "ragged"),
    "ragged-mixed": ("mixed", "ragged"),
}
"""Deployment -> (which adapters, which layout of `lvnas pack`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Engine:
    """One server process, or one that runs already."""

    models: dict[str, str]
    """Name in the load -> model that the server knows; an empty model means the base."""
    sources: tuple[str, ...] = ()
    """What `lvnas serve` is given."""
    base: str | None = None
    group: str | None = None
    url: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Deployment:
    """A named way to serve all adapters of a comparison."""

    name: str
    engines: list[Engine]
    rank_classes: dict[str, str] = field(default_factory=dict)
    slots: int | None = None
    adapter_bytes: int | None = None
    """What the adapters that are resident at once take, by the arithmetic of `lvnas inspect --plan`."""


def deployments(
    names: Sequence[str], mixed: Sequence[str], uniform: Sequence[str], folder: Path, slots: int | None = None
) -> list[Deployment]:
    """The deployments called `names`, with their packs made in `folder`.

    Args:
        names: any of KINDS, or NAME=URL for a server that runs already.
        mixed, uniform: adapters as `lvnas pack` takes them; only those that `names` needs.
        slots: adapters resident at once, in every deployment.

    Raises:
        InputError: an unknown name, adapters missing or not the same number, a pack that cannot be made.
    """
    from lvnas.sources import find_adapters

    kinds = [name for name in names if "=" not in name]
    for name in kinds:
        if name not in KINDS:
            raise unknown("deployment", name, (*KINDS, "NAME=URL"))
    if len(set(names)) < len(names):
        raise InputError(f"deployments {','.join(names)}: a name occurs twice")
    found = {
        "mixed": find_adapters(mixed) if mixed else [],
        "uniform": find_adapters(uniform) if uniform else [],
    }
    for name in kinds:
        which = KINDS[name][0]
        if which and not found[which]:
            raise InputError(f"deployment {name} needs adapters; give them with --{which}")
    labels = [adapter.name for adapter in found["mixed"] or found["uniform"]]
    if found["mixed"] and found["uniform"] and len(found["uniform"]) != len(labels):
        counts = f"{len(labels)} mixed and {len(found['uniform'])} uniform"
        raise InputError(f"{counts} adapters; a comparison needs the same number of both, in the same order")
    made = []
    for name in names:
        if "=" in name:
            title, _, url = name.partition("=")
            made.append(_running(title, url, labels))
        elif name == "base":
            made.append(_base(found["mixed"] or found["uniform"], labels))
        else:
            made.append(_packed(name, found, labels, folder / name, slots))
    return made


def adapters_of(name: str, mixed: Sequence[str], uniform: Sequence[str]) -> Sequence[str]:
    """Those of the two lists that deployment `name` serves.

    Raises:
        InputError: an unknown deployment, or one without adapters.
    """
    serving = [kind for kind, (which, _) in KINDS.items() if which]
    if name not in serving:
        raise unknown("deployment with adapters", name, serving)
    return mixed if KINDS[name][0] == "mixed" else uniform


def _running(name: str, url: str, labels: Sequence[str]) -> Deployment:
    """A server that runs: its models are `labels`, or all its adapters where no label is known."""
    models = check_url_models(url, labels)
    return Deployment(
        name=name, engines=[Engine(models={model: model for model in models}, url=normal_url(url))]
    )


def _base(adapters: Sequence["Adapter"], labels: Sequence[str]) -> Deployment:
    base = adapters[0].base if adapters else None
    if base is None:
        raise InputError(
            "deployment base: the adapters name no base; give --mixed or --uniform adapters that do"
        )
    return Deployment(name="base", engines=[Engine(models=dict.fromkeys(labels, ""), base=base)])


def _packed(
    name: str, found: dict[str, list["Adapter"]], labels: Sequence[str], folder: Path, slots: int | None
) -> Deployment:
    from lvnas.inspect import adapter_shape, plan
    from lvnas.manifest import MANIFEST_NAME
    from lvnas.pack import PackOptions, pack
    from lvnas.packfolder import PROVENANCE_NAME

    which, layout = KINDS[name]
    assert which and layout
    adapters = found[which]
    for old in (MANIFEST_NAME, PROVENANCE_NAME):  # of an earlier pack, whose adapters would be served too
        (folder / old).unlink(missing_ok=True)
    manifest = pack(adapters, folder, PackOptions(layout=layout, slots=slots), None, lambda _: None)
    label_of = dict(zip((adapter.name for adapter in adapters), labels, strict=True))
    known = read_pack(folder)
    groups = (
        {group["name"]: group["adapters"] for group in manifest.get("groups") or ()}
        if layout == "group"
        else {}
    )
    engines = [
        Engine(models={label_of[model]: model for model in models}, sources=(str(folder),), group=group)
        for group, models in (groups or {None: known.adapters}).items()
    ]
    resident = manifest["serve"]["max_loras"]
    layouts = plan([adapter_shape(adapter) for adapter in adapters], len(adapters), resident)
    return Deployment(
        name=name,
        engines=engines,
        rank_classes={label_of[model]: rank_class for model, rank_class in known.rank_classes.items()},
        slots=resident,
        adapter_bytes=next(one["device_bytes"] for one in layouts if one["layout"] == layout),
    )
