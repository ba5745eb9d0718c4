"""A rank for every module: `ranks.json`, and what it costs in parameters."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lvnas import files
from lvnas.errors import InputError, unknown
from lvnas.modules import canonical_name

FORMAT = "lvnas-ranks/1"
SCALINGS = {"constant": 0.0, "alpha": 1.0, "rslora": 0.5}
"""Convention -> e of the scaling s * (R / r) ** e, R the highest rank. `constant`: alpha grows with the rank.
`alpha`: one alpha for all, alpha / r. `rslora`: one alpha for all, alpha / sqrt(r) (arXiv 2312.03732)."""


@dataclass(kw_only=True, slots=True)
class RankPlan:
    """The ranks of one adapter, as `ranks.json` holds them."""

    ranks: dict[str, int]
    """Full module name (transformers >= 5) -> rank; rank 0 means no adapter on that module."""
    base: str | None = None
    """Base name, Hub id or folder."""
    task: str | None = None
    """Task that the ranks were searched on."""
    method: str | None = None
    """Search strategy, or None when written by hand."""
    space: list[int] = field(default_factory=list)
    """Ranks that the search could choose from."""
    scale: float = 1.0
    """LoRA scaling s of a module of the highest rank."""
    scaling: str = "constant"
    """How the scaling depends on a module's rank: one of SCALINGS."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Command, config, versions, seeds, hashes of the inputs."""

    def write(self, path: Path) -> None:
        """Writes the plan to `path` atomically."""
        files.write_json(
            path,
            {
                "format": FORMAT,
                "base": self.base,
                "task": self.task,
                "method": self.method,
                "space": self.space,
                "scaling": {"convention": self.scaling, "scale": self.scale},
                "ranks": self.ranks,
                "provenance": dict(self.provenance),
            },
        )

    @classmethod
    def read(cls, path: Path) -> "RankPlan":
        """Reads `ranks.json`, or a bare JSON object {module name: rank} as other tools publish.

        Raises:
            InputError: not such a file, a rank that is not a whole number >= 0, or an unknown scaling.
        """
        value = files.read_json(path)
        if not isinstance(value, dict):
            raise InputError(
                f"{path} holds {_kind(value)}; expected ranks.json or an object of module name: rank"
            )
        if value.get("format") not in (None, FORMAT):
            raise InputError(f"{path} has format {value['format']!r}; this lvnas reads {FORMAT!r}")
        ranks = value.get("ranks") if "format" in value else value
        if not isinstance(ranks, dict) or not ranks:
            raise InputError(f"{path} names no module's rank; expected an object of module name: rank")
        for name, rank in ranks.items():
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
                raise InputError(f"{path}: rank {json.dumps(rank)} of {name} is not a whole number >= 0")
        named = {canonical_name(name): rank for name, rank in ranks.items()}
        if len(named) != len(ranks):
            twice = [name for name, count in Counter(map(canonical_name, ranks)).items() if count > 1]
            raise InputError(f"{path} names a module twice: {twice[0]}")
        if "format" not in value:
            return cls(ranks=named)
        return cls(
            ranks=named,
            base=value.get("base"),
            task=value.get("task"),
            method=value.get("method"),
            space=value.get("space") or [],
            scale=float(value.get("scaling", {}).get("scale", 1.0)),
            scaling=check_scaling(value.get("scaling", {}).get("convention", "constant")),
            provenance=value.get("provenance") or {},
        )

    @property
    def highest(self) -> int:
        """The rank whose scaling is s under every convention: the space's highest, or else the plan's."""
        return max([*self.space, *self.ranks.values()])

    def scale_of(self, rank: int) -> float:
        """The scaling of a module of `rank` > 0."""
        return self.scale * (self.highest / rank) ** SCALINGS[self.scaling]

    def parameters(self, shapes: Mapping[str, tuple[int, int]]) -> int:
        """LoRA parameters of the plan: the sum of rank * (in + out).

        Args:
            shapes: module name -> (in_features, out_features) of the base.

        Raises:
            InputError: a module of the plan that the base does not have.
        """
        missing = [name for name in self.ranks if name not in shapes]
        if missing:
            raise InputError(
                f"{len(missing)} of {len(self.ranks)} modules are not in this base, the first is {missing[0]!r}; "
                "the ranks belong to another base or architecture"
            )
        return sum(rank * sum(shapes[name]) for name, rank in self.ranks.items())


def uniform(names: Mapping[str, Any] | list[str], rank: int) -> RankPlan:
    """The same rank for every module in `names`."""
    return RankPlan(ranks=dict.fromkeys(names, rank), method="uniform", space=[rank])


def check_scaling(name: str) -> str:
    """Returns `name` if it is a scaling convention.

    Raises:
        InputError: it is not one.
    """
    if name not in SCALINGS:
        raise unknown("scaling", name, SCALINGS)
    return name


def _kind(value: Any) -> str:
    return "a list" if isinstance(value, list) else f"a bare {type(value).__name__}"
