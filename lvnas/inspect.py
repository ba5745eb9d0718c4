"""`lvnas inspect`: what an adapter, a ranks file or a pack holds, what each layout makes of it, how two differ."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvnas import files
from lvnas.adapter_config import CONFIG_NAME
from lvnas.adapters import Adapter, read_adapter
from lvnas.errors import InputError
from lvnas.layouts import legal_rank
from lvnas.manifest import MANIFEST_NAME, read_manifest
from lvnas.ranks import RankPlan
from lvnas.tensorfile import ITEM_BYTES
from lvnas.values import dtype_name

if TYPE_CHECKING:
    from torch import Tensor

    from lvnas.lora_modules import Factored


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """An adapter without its weights: enough to plan memory."""

    name: str
    base: str | None
    item_bytes: int
    modules: Mapping[str, tuple[int, int, int]]
    """Module -> (in_features, out_features, rank)."""

    @property
    def max_rank(self) -> int:
        """The engine's max_lora_rank for it."""
        return legal_rank(max(rank for _, _, rank in self.modules.values()))

    @property
    def parameters(self) -> int:
        """Sum of rank * (in + out)."""
        return sum(rank * (inputs + outputs) for inputs, outputs, rank in self.modules.values())

    @property
    def width(self) -> int:
        """Sum of in + out: parameters per rank."""
        return sum(inputs + outputs for inputs, outputs, _ in self.modules.values())

    def layout_bytes(self) -> dict[str, int]:
        """Bytes of the values in each layout."""
        padded = self.max_rank * self.width * self.item_bytes
        return {"pad": padded, "group": padded, "ragged": self.parameters * self.item_bytes}


def adapter_shape(adapter: Adapter) -> Shape:
    """The shape of an adapter that has been read."""
    modules = {name: (m.in_features, m.out_features, m.rank) for name, m in adapter.modules.items()}
    return Shape(name=adapter.name, base=adapter.base, item_bytes=ITEM_BYTES[adapter.dtype], modules=modules)


def planned_shape(path: Path, base: str | None, item_bytes: int = 2) -> Shape:
    """The shape of the adapter that the ranks file at `path` would give on `base` (by default the file's own).

    Raises:
        InputError: not a ranks file, no base named, modules that the base does not have, or no rank above 0.
    """
    from lvnas.bases.shapes import linear_shapes

    plan = RankPlan.read(path)
    base = base or plan.base
    if base is None:
        raise InputError(f"{path} names no base; give it with --base")
    shapes = linear_shapes(base)
    plan.parameters(shapes)
    modules = {name: (*shapes[name], rank) for name, rank in plan.ranks.items() if rank}
    if not modules:
        raise InputError(f"{path} gives every module rank 0: no adapter; give at least one a rank above 0")
    return Shape(name=path.stem, base=base, item_bytes=item_bytes, modules=modules)


def read_shapes(source: Path, base: str | None = None) -> list[Shape]:
    """The shapes in `source`: an adapter's folder, a pack, or a ranks file.

    Raises:
        InputError: nothing of the kind, or broken.
    """
    if source.is_file():
        return [planned_shape(source, base)]
    if (source / MANIFEST_NAME).exists():
        return [_entry_shape(source, entry) for entry in read_manifest(source)["adapters"]]
    return [adapter_shape(read_adapter(source))]


def _entry_shape(pack: Path, entry: Mapping[str, Any]) -> Shape:
    """The unpadded shape of a packed adapter."""
    adapter = read_adapter(pack / entry["path"], entry["name"])
    modules = {
        name: (module.in_features, module.out_features, entry["ranks"].get(name, module.rank))
        for name, module in adapter.modules.items()
    }
    return Shape(name=entry["name"], base=adapter.base, item_bytes=ITEM_BYTES[adapter.dtype], modules=modules)


def describe(source: Path, base: str | None = None) -> list[dict[str, Any]]:
    """One JSON-ready description for each adapter in `source` (adapter, pack or ranks file)."""
    shapes = read_shapes(source, base)
    if (source / CONFIG_NAME).exists():
        return [_describe_shape(shapes[0]) | _describe_adapter(read_adapter(source))]
    if source.is_dir():
        manifest = read_manifest(source)
        entries = {entry["name"]: entry for entry in manifest["adapters"]}
        return [
            _describe_shape(shape)
            | {"layout": manifest["layout"]}
            | {
                key: entries[shape.name].get(key)
                for key in ("path", "dtype", "scaling", "task", "vision_features", "pre_image_rows", "files")
            }
            for shape in shapes
        ]
    return [_describe_shape(shapes[0])]


def _describe_shape(shape: Shape) -> dict[str, Any]:
    ranks = {name: rank for name, (_, _, rank) in shape.modules.items()}
    return {
        "name": shape.name,
        "base": shape.base,
        "modules": len(ranks),
        "parameters": shape.parameters,
        "max_rank": shape.max_rank,
        "mean_rank": sum(ranks.values()) / len(ranks),
        "rank_counts": {str(rank): count for rank, count in sorted(Counter(ranks.values()).items())},
        "layout_bytes": shape.layout_bytes(),
        "used": shape.parameters / (shape.max_rank * shape.width),
        "ranks": ranks,
    }


def _describe_adapter(adapter: Adapter) -> dict[str, Any]:
    scales = [module.scale for module in adapter.modules.values()]
    return {
        "dtype": dtype_name(adapter.dtype),
        "scaling": {"lowest": min(scales), "highest": max(scales)},
        "task": adapter.metadata.get("task"),
        "vision_features": adapter.metadata.get("vision_features"),
        "pre_image_rows": adapter.metadata.get("pre_image_rows"),
        "files": {path.name: files.sha256(path) for path in adapter.files},
        "notes": adapter.notes,
    }


def plan(shapes: Sequence[Shape], adapters: int, slots: int) -> list[dict[str, Any]]:
    """Memory of `adapters` adapters like `shapes` (taken in turn) with `slots` of them on the device, per layout.

    Stock vLLM allocates every slot of every module at max_lora_rank, so `pad` and `group` cost slots * max rank *
    (in + out) whatever the adapters hold; the ragged pool holds the adapters' own values, here the largest ones.

    Raises:
        InputError: counts below 1, or no shapes.
    """
    if adapters < 1 or slots < 1:
        raise InputError(f"{adapters} adapters and {slots} slots; both must be at least 1")
    if not shapes:
        raise InputError("no adapters to plan for; give at least one")
    each, rest = divmod(adapters, len(shapes))
    chosen = [(shape, each + (index < rest)) for index, shape in enumerate(shapes) if each or index < rest]
    ranks = sorted({shape.max_rank for shape, _ in chosen})
    groups = [[(shape, count) for shape, count in chosen if shape.max_rank == rank] for rank in ranks]
    padded, ragged = (
        sum(count * shape.layout_bytes()[layout] for shape, count in chosen) for layout in ("pad", "ragged")
    )
    return [
        _planned("pad", [chosen], slots, disk=padded),
        _planned("group", groups, slots, disk=padded),
        _planned("ragged", [chosen], slots, disk=ragged) | {"device_bytes": _largest(chosen, slots)},
    ]


def _planned(
    layout: str, engines: Sequence[Sequence[tuple[Shape, int]]], slots: int, disk: int
) -> dict[str, Any]:
    """One layout's memory; an engine's members are shapes with the number of adapters of each."""
    settings = []
    for members in engines:
        widths: dict[str, int] = {}
        for shape, _ in members:
            widths |= {name: inputs + outputs for name, (inputs, outputs, _) in shape.modules.items()}
        rank = max(shape.max_rank for shape, _ in members)
        resident = min(slots, sum(count for _, count in members))
        size = resident * rank * sum(widths.values()) * max(shape.item_bytes for shape, _ in members)
        settings.append({"max_lora_rank": rank, "max_loras": resident, "device_bytes": size})
    return {
        "layout": layout,
        "engines": settings,
        "disk_bytes": disk,
        "device_bytes": sum(engine["device_bytes"] for engine in settings),
    }


def _largest(members: Sequence[tuple[Shape, int]], slots: int) -> int:
    """Bytes of the values of the `slots` largest adapters."""
    total = 0
    for shape, count in sorted(members, key=lambda member: member[0].layout_bytes()["ragged"], reverse=True):
        taken = min(count, slots)
        total += taken * shape.layout_bytes()["ragged"]
        slots -= taken
    return total


def diff(first: Adapter, second: Adapter) -> dict[str, Any]:
    """How two adapters differ: modules, ranks, and for shared modules the relative distance of their updates.

    Distance is the Frobenius norm of the updates' difference over that of the first one's update; 1 where only the
    second has one.

    Raises:
        InputError: modules of different sizes, or a first adapter without any update, which distances are relative to.
    """
    shared = [name for name in first.modules if name in second.modules]
    distances = {name: update_distance(first.modules[name], second.modules[name]) for name in shared}
    if any(distances.values()) and not any(_has_update(module) for module in first.modules.values()):
        raise InputError(
            f"{first.name} has no update: all its B or A are 0, so that no distance can be relative to it; "
            f"name {second.name} first"
        )
    ranks = {
        name: [first.modules[name].rank, second.modules[name].rank]
        for name in shared
        if first.modules[name].rank != second.modules[name].rank
    }
    return {
        "first": first.name,
        "second": second.name,
        "base": [first.base, second.base],
        "parameters": [first.parameters, second.parameters],
        "only_first": [name for name in first.modules if name not in second.modules],
        "only_second": [name for name in second.modules if name not in first.modules],
        "ranks": ranks,
        "distances": distances,
        "largest_distance": max(distances.values(), default=None),
    }


def update_distance(first: "Factored", second: "Factored") -> float:
    """|| s1 B1 A1 - s2 B2 A2 || / || s1 B1 A1 || in the Frobenius norm, without forming the updates.

    1 where the first update is 0 and the second is not, 0 where both are.

    Raises:
        InputError: modules of different sizes.
    """
    import torch

    if (first.in_features, first.out_features) != (second.in_features, second.out_features):
        raise InputError(f"{first.name} has other sizes in the two adapters; they are for different bases")
    (a1, b1), (a2, b2) = ((a.double(), b.double()) for a, b in (first.factors(), second.factors()))
    # The difference is one product [B1, B2] @ [s1 A1; -s2 A2]; two QR factorisations leave a small core of its norm.
    difference = _norm(torch.cat([first.scale * a1, -second.scale * a2]), torch.cat([b1, b2], dim=1))
    return difference / (_norm(first.scale * a1, b1) or difference or 1.0)


def _has_update(module: "Factored") -> bool:
    return all(bool(factor.any()) for factor in module.factors())


def _norm(a_RD: "Tensor", b_OR: "Tensor") -> float:
    """The Frobenius norm of b @ a."""
    import torch

    core = torch.linalg.qr(b_OR).R @ torch.linalg.qr(a_RD.T).R.T
    return float(torch.linalg.norm(core))
