"""A rank for every module: `ranks.json`, and what it costs in parameters."""

import json
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lvnas import files
from lvnas.adapter_config import MAX_RANK
from lvnas.errors import InputError, unknown
from lvnas.modules import canonical_name

FORMAT = "lvnas-ranks/1"
SCALINGS = {"constant": 0.0, "alpha": 1.0, "rslora": 0.5}
"""Convention -> e of the scaling s * (R / r) ** e, R the highest rank. `constant`: alpha grows with the rank.
`alpha`: one alpha for all, alpha / r. `rslora`: one alpha for all, alpha / sqrt(r) (arXiv 2312.03732)."""
_KINDS: dict[str, tuple[type, str]] = {
    **dict.fromkeys(("base", "task", "method"), (str, "text or null")),
    "space": (list, "a list of ranks"),
    **dict.fromkeys(("scaling", "provenance"), (dict, "an object {...}")),
}
_RANK = f"a whole number >= 0, at most {MAX_RANK}"


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
            InputError: not such a file, or a value that cannot be: the message names it.
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
            if not _is_rank(rank):
                raise _bad(path, f"rank of {name}", rank, _RANK)
        named = {canonical_name(name): rank for name, rank in ranks.items()}
        if len(named) != len(ranks):
            twice = [name for name, count in Counter(map(canonical_name, ranks)).items() if count > 1]
            raise InputError(f"{path} names a module twice: {twice[0]}")
        if "format" not in value:
            return cls(ranks=named)
        for key, (kind, expected) in _KINDS.items():
            if not isinstance(value.get(key), kind | None):
                raise _bad(path, key, value[key], expected)
        space, scaling = value.get("space") or [], value.get("scaling") or {}
        for rank in space:
            if not _is_rank(rank):
                raise _bad(path, "rank of the space", rank, _RANK)
        scale, convention = scaling.get("scale", 1.0), scaling.get("convention", "constant")
        if type(scale) not in (int, float) or not 0 < scale <= sys.float_info.max:
            raise _bad(path, "scale", scale, "a number > 0")
        if convention not in list(SCALINGS):
            raise _bad(path, "scaling convention", convention, f"one of {', '.join(SCALINGS)}")
        return cls(
            ranks=named,
            base=value.get("base"),
            task=value.get("task"),
            method=value.get("method"),
            space=space,
            scale=float(scale),
            scaling=convention,
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


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_RANK


def _bad(path: Path, what: str, value: Any, expected: str) -> InputError:
    return InputError(f"{path}: {what} is {json.dumps(value)[:80]}; expected {expected}")


def _kind(value: Any) -> str:
    return "a list" if isinstance(value, list) else f"a bare {type(value).__name__}"
