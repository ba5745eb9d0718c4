"""`lvnas report`: pictures and tables of what the other verbs wrote."""

import io
import itertools
import re
import typing
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.colors import BoundaryNorm

from lvnas import files
from lvnas.adapters import read_adapter
from lvnas.errors import InputError
from lvnas.evaluate import FORMAT, RESULTS, Result
from lvnas.modules import ATTENTION, GATED_MLP, PLAIN_MLP, is_vision
from lvnas.ranks import RankPlan
from lvnas.tables import markdown
from lvnas.task_search import RANKS
from lvnas.tensorfile import shorten

KINDS = (*ATTENTION, *GATED_MLP, *PLAIN_MLP)
_LAYER = re.compile(r"^(?P<stack>.*?)\.?(?:layers|layer|blocks|h)\.(?P<index>\d+)\.(?P<rest>.*)$")


def report(paths: Sequence[Path], out: Path) -> list[Path]:
    """Draws a rank map for every ranks file or adapter folder in `paths`, and a table for every results.json.

    A path that is given twice counts once. Files take the last part of their path as name, with the folder before it
    where several paths end alike.

    Returns:
        The files written into the folder `out`.

    Raises:
        InputError: a path that is none of these; nothing is written then.
    """
    places = list(dict.fromkeys(_place(Path(path).resolve()) for path in paths))
    tables = {place: read_results(place) for place in places if place.name == RESULTS}
    maps = {place: read_ranks(place) for place in places if place.name != RESULTS}
    names = dict(zip([*tables, *maps], [*_names(list(tables)), *_names(list(maps))], strict=True))
    written = []
    for place in places:
        if place in tables:
            written.append(Path(out) / ("table.md" if len(tables) == 1 else f"{names[place]}-table.md"))
            files.write_text(written[-1], markdown(tables[place]) + "\n")
        else:
            written.append(Path(out) / f"{names[place]}-ranks.png")
            rank_map(maps[place], written[-1], title=names[place])
    return written


def _place(path: Path) -> Path:
    return path / RESULTS if (path / RESULTS).is_file() else path


def _names(places: Sequence[Path]) -> list[str]:
    """A name for each place: the last part that tells something, its folder before it if another ends alike, and a
    number behind it if that is taken."""
    subjects = [
        place.parent if place.name in (RANKS, RESULTS) else place if place.is_dir() else place.with_suffix("")
        for place in places
    ]
    counts = Counter(subject.name for subject in subjects)
    names: list[str] = []
    for subject in subjects:
        name = subject.name if counts[subject.name] == 1 else f"{subject.parent.name}-{subject.name}"
        numbered = (f"{name}-{number}" for number in itertools.count(2))
        names.append(next(free for free in itertools.chain([name], numbered) if free not in names))
    return names


def read_results(path: Path) -> list[Result]:
    """The rows of a results.json.

    Raises:
        InputError: not such a file, or a row that is no result.
    """
    value = files.read_json(path)
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise InputError(f"{path} is no {FORMAT} file")
    rows = value.get("rows")
    if not isinstance(rows, list):
        raise InputError(f"{path} has no list of rows; write it again with lvnas evaluate --out")
    return [_result(row, f"{path}, row {number}") for number, row in enumerate(rows, 1)]


def _result(row: typing.Any, where: str) -> Result:
    kinds = typing.get_type_hints(Result)
    if not isinstance(row, dict) or row.keys() != kinds.keys():
        raise InputError(
            f"{where} is {shorten(row)}; expected {', '.join(kinds)}; write it again with lvnas evaluate --out"
        )
    for key, kind in kinds.items():
        is_whole = type(row[key]) is int and kind is not int and abs(row[key]) < 1 << 53
        if not isinstance(float(row[key]) if is_whole else row[key], kind):
            raise InputError(
                f"{where}: {key} is {shorten(row[key])}; write it again with lvnas evaluate --out"
            )
    return Result(**row)


def read_ranks(path: Path) -> dict[str, int]:
    """Module -> rank, from a ranks file or an adapter folder.

    Raises:
        InputError: neither.
    """
    if path.is_dir():
        return read_adapter(path, path.name).ranks
    return RankPlan.read(path).ranks


def rank_map(ranks: Mapping[str, int], out: Path, *, title: str = "") -> None:
    """Draws the rank of every module as a picture, module kind by layer, one panel per stack of layers (the paper's
    Figure 5), and writes it to `out` as PNG.

    Cross-attention layers are marked with an x on the axis. A white cell is a module without an adapter.
    """
    stacks = _stacks(ranks)
    levels = sorted(set(ranks.values()))
    layers = max(8, *(grid.shape[1] for grid, _, _ in stacks.values()))
    rows = [grid.shape[0] for grid, _, _ in stacks.values()]
    figure, axes = plt.subplots(
        len(stacks),
        1,
        figsize=(2.6 + 0.22 * layers, 0.6 + sum(0.7 + 0.22 * row for row in rows)),
        height_ratios=rows,
        squeeze=False,
        layout="constrained",
    )
    colours = plt.get_cmap("viridis_r", len(levels))
    norm = BoundaryNorm(np.arange(len(levels) + 1) - 0.5, len(levels))
    for axis, (stack, (grid, kinds, crossed)) in zip(axes[:, 0], stacks.items(), strict=True):
        places = np.searchsorted(levels, np.nan_to_num(grid))
        masked = np.ma.masked_array(places, np.isnan(grid))
        image = axis.imshow(masked, aspect="auto", cmap=colours, norm=norm, interpolation="none")
        axis.set_title(f"{stack}{' (x: cross-attention)' if crossed else ''}", fontsize=9)
        axis.set_xlim(-0.5, layers - 0.5)
        axis.set_yticks(range(len(kinds)), kinds, fontsize=7)
        shown = [i for i in range(grid.shape[1]) if i in crossed or i % 5 == 0 or grid.shape[1] <= 10]
        axis.set_xticks(shown, [f"{i}x" if i in crossed else str(i) for i in shown], fontsize=7)
    bar = figure.colorbar(image, ax=axes[:, 0].tolist(), ticks=range(len(levels)), fraction=0.04, pad=0.01)
    bar.ax.set_yticklabels([str(level) for level in levels], fontsize=8)
    bar.set_label("rank", fontsize=8)
    figure.supxlabel("layer", fontsize=8)
    figure.suptitle(title, fontsize=10)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150, metadata={"Software": None})
    plt.close(figure)
    files.write_bytes(out, picture.getvalue())


def _stacks(ranks: Mapping[str, int]) -> dict[str, tuple[np.ndarray, list[str], set[int]]]:
    """Stack of layers -> (ranks [kinds, layers] with NaN where there is no module, kinds, cross-attention layers)."""
    cells: dict[str, dict[tuple[str, int], int]] = {}
    crossed: dict[str, set[int]] = {}
    for name, rank in ranks.items():
        match = _LAYER.match(name)
        stack = match["stack"] if match else name.rpartition(".")[0] or name
        index = int(match["index"]) if match else 0
        stack = stack.removeprefix("model.") or "model"
        cells.setdefault(stack, {})[name.rpartition(".")[2], index] = rank
        if match and "cross_attn" in match["rest"]:
            crossed.setdefault(stack, set()).add(index)
    stacks = {}
    for stack in sorted(
        cells, key=lambda name: (not is_vision(f"{name}."), name.endswith("global_transformer"))
    ):
        found = {kind for kind, _ in cells[stack]}
        kinds = [kind for kind in KINDS if kind in found] + sorted(found.difference(KINDS))
        grid = np.full((len(kinds), 1 + max(index for _, index in cells[stack])), np.nan)
        for (kind, index), rank in cells[stack].items():
            grid[kinds.index(kind), index] = rank
        stacks[stack] = (grid, kinds, crossed.get(stack, set()))
    return stacks
