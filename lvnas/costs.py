"""What a rank costs in a module: LoRA parameters, bytes of a serving slot, or time measured on a device.

Legend: N modules, K ranks in the space.

A slot of the layout `ragged` holds every module at its own rank. Under `pad` and `group` a slot holds all of an
adapter's modules at the adapter's highest rank, rounded up to one that vLLM can be started with: what a module
costs then depends on the others (`Costs.shared`).
"""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lvnas import files
from lvnas.errors import InputError, unknown
from lvnas.layouts import legal_rank
from lvnas.sizes import parse_bytes

FORMAT = "lvnas-costs/1"
ELEMENT_BYTES = 2
"""Of the 16-bit types that adapters are served in."""
UNITS = {"params": "parameters", "ragged": "bytes", "pad": "bytes", "group": "bytes", "latency": "seconds"}
"""Table -> its unit. All but `latency` follow from the shapes; `lvnas profile` measures that one."""
SHARED = ("pad", "group")
_SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9}
_SECONDS = {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6}

Shapes = Mapping[str, tuple[int, int]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Costs:
    """A cost table over the modules and the space of a search."""

    unit: str
    """`parameters`, `bytes` or `seconds`."""
    ranks: list[int]
    """The space, ascending."""
    values: np.ndarray
    """[N, K], not decreasing along K."""
    shared: bool = False
    """Whether an adapter's modules of rank > 0 all cost what its highest rank costs in them."""

    def uniform(self, rank: float) -> float:
        """What this rank in every module costs; between the space's ranks by interpolation."""
        # Seconds summed in another order than the allocator's may be a rounding error too few for the lowest rank.
        totals = self.values.sum(axis=0) * (1 + 1e-12 if self.unit == "seconds" else 1)
        if rank > self.ranks[-1]:
            return totals[-1] * rank / self.ranks[-1]
        return float(np.interp(rank, [0, *self.ranks], [0, *totals]))

    def spent(self, plan: Mapping[str, int]) -> float:
        """What `plan` (module -> rank, in the order of the modules) costs."""
        picks = np.array([self.ranks.index(rank) for rank in plan.values()])
        if self.shared:
            picks = np.where(np.array(list(plan.values())) > 0, picks.max(), picks)
        return float(self.values[np.arange(len(picks)), picks].sum())


def costs(by: str, shapes: Shapes, ranks: Sequence[int], table: Path | str | None = None) -> Costs:
    """The costs of `ranks` in modules of these `shapes`.

    Args:
        by: a table's name: one of UNITS, or whatever the file has.
        table: a file that `lvnas profile` wrote; needed for `latency` only.

    Raises:
        InputError: an unknown table, one that must be measured, or a file without these shapes and ranks.
    """
    if table is not None:
        return _from_file(by, shapes, list(ranks), Path(table))
    if by == "latency":
        raise InputError(
            "latency must be measured: make a table with `lvnas profile --out FILE`, give it with --costs FILE"
        )
    if by not in UNITS:
        raise unknown("cost", by, UNITS)
    values = [shape_costs(by, shape, ranks) for shape in shapes.values()]
    return Costs(unit=UNITS[by], ranks=list(ranks), values=np.array(values), shared=by in SHARED)


def shape_costs(by: str, shape: tuple[int, int], ranks: Sequence[int]) -> list[int]:
    """Parameters or bytes of a module of this (in_features, out_features) at each rank."""
    if by == "params":
        return [rank * sum(shape) for rank in ranks]
    stored = [legal_rank(rank) if by in SHARED and rank else rank for rank in ranks]
    return [rank * sum(shape) * ELEMENT_BYTES for rank in stored]


def write_table(path: Path, ranks: Sequence[int], tables: Mapping[str, Any], **facts: Any) -> None:
    """Writes a cost table file: `tables` is name -> {unit, shared, costs: {"DxO": one value per rank}}."""
    files.write_json(path, {"format": FORMAT, "ranks": list(ranks), "tables": tables, **facts})


def shape_name(shape: tuple[int, int]) -> str:
    """How a table file calls a shape: 4096x14336."""
    return f"{shape[0]}x{shape[1]}"


def _from_file(by: str, shapes: Shapes, ranks: list[int], path: Path) -> Costs:
    content = files.read_json(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path} is no cost table of format {FORMAT!r}; make one with `lvnas profile`")
    measured, tables = content.get("ranks"), content.get("tables")
    if not isinstance(measured, list) or not isinstance(tables, dict):
        raise InputError(f"{path} is broken: it needs ranks and tables; make it again with `lvnas profile`")
    if by not in tables:
        raise InputError(f"{path} has no table {by!r}; it has {', '.join(tables)}")
    table = _checked(tables[by], by, measured, path)
    if missing := [rank for rank in ranks if rank not in measured and rank > 0]:
        raise InputError(
            f"{path} has no costs of rank {missing[0]}, only of {', '.join(map(str, measured))}; "
            f"make it again with --ranks {','.join(map(str, ranks))}"
        )
    rows = []
    for name, shape in shapes.items():
        row = table["costs"].get(shape_name(shape))
        if row is None:
            raise InputError(
                f"{path} has no costs of {shape_name(shape)} ({name}), only of {', '.join(table['costs'])}; "
                "it is for another base or other targets"
            )
        known = {0: 0.0, **dict(zip(measured, row, strict=True))}
        rows.append([known[rank] for rank in ranks])
    # Measured times may cross by chance; a higher rank is never taken for cheaper.
    values = np.maximum.accumulate(np.array(rows), axis=1)
    return Costs(unit=table["unit"], ranks=ranks, values=values, shared=table["shared"])


def _checked(table: Any, by: str, ranks: list[Any], path: Path) -> dict[str, Any]:
    """The table `by` of the file at `path` if it is whole."""
    kinds = {"unit": str, "shared": bool, "costs": dict}
    if isinstance(table, dict) and all(isinstance(table.get(key), kind) for key, kind in kinds.items()):
        numbers = [ranks, *table["costs"].values()]
        if table["unit"] in UNITS.values() and all(_are_costs(row, len(ranks)) for row in numbers):
            return table
    raise InputError(
        f"{path} is broken: its table {by!r} needs a unit ({', '.join(sorted(set(UNITS.values())))}), shared, and "
        "costs with one finite number >= 0 for each of its ranks; make it again with `lvnas profile`"
    )


def _are_costs(row: Any, count: int) -> bool:
    return (
        isinstance(row, list)
        and len(row) == count
        and all(type(value) in (int, float) and 0 <= value <= sys.float_info.max for value in row)
    )


def parse_amount(text: str | float, unit: str) -> float:
    """`"103.3M"` parameters, `"12MB"` or `"1.5ms"` as a number of `unit`.

    Raises:
        InputError: not of this unit.
    """
    if not isinstance(text, str):
        return float(text)
    if unit == "bytes":
        return float(parse_bytes(text))
    if unit == "seconds":
        match = re.fullmatch(r"\s*(\d*\.?\d+(?:e-?\d+)?)\s*(s|ms|us|)\s*", text)
        if not match:
            raise InputError(f"budget {text!r} is not a time; write 0.0015, 1.5ms or 800us")
        return float(match[1]) * _SECONDS[match[2]]
    return parse_count(text)


def parse_count(text: str | int) -> float:
    """`"103.3M"` -> 103300000.0; suffixes K, M, G or B in either case.

    Raises:
        InputError: not a number with such a suffix.
    """
    match = re.fullmatch(r"\s*([0-9_]*\.?[0-9]+(?:e[0-9]+)?)\s*([kmgb]?)\s*", str(text).lower())
    if not match or float(match[1]) * _SUFFIXES[match[2]] > sys.float_info.max:
        raise InputError(f"budget {text!r} is not a number of parameters; write 103255040, 103.3M or 1.2G")
    return float(match[1]) * _SUFFIXES[match[2]]
