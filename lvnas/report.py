"""`lvnas report`: pictures and tables of what the other verbs wrote."""

import io
import re
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
from lvnas.evaluate import FORMAT, Result
from lvnas.modules import ATTENTION, GATED_MLP, PLAIN_MLP, is_vision
from lvnas.ranks import RankPlan
from lvnas.tables import markdown

KINDS = (*ATTENTION, *GATED_MLP, *PLAIN_MLP)
_LAYER = re.compile(r"^(?P<stack>.*?)\.?(?:layers|layer|blocks|h)\.(?P<index>\d+)\.(?P<rest>.*)$")


def report(paths: Sequence[Path], out: Path) -> list[Path]:
    """Draws a rank map for every ranks file or adapter folder in `paths`, and a table for every results.json.

    Returns:
        The files written into the folder `out`.

    Raises:
        InputError: a path that is none of these.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for path in map(Path, paths):
        if path.name == "results.json" or (path / "results.json").is_file():
            source = path if path.is_file() else path / "results.json"
            target = out / "table.md"
            files.write_text(target, markdown(read_results(source)) + "\n")
        else:
            ranks = read_ranks(path)
            name = path.parent.name if path.name == "ranks.json" else path.stem
            target = out / f"{name}-ranks.png"
            rank_map(ranks, target, title=name)
        written.append(target)
    return written


def read_results(path: Path) -> list[Result]:
    """The rows of a results.json.

    Raises:
        InputError: not such a file.
    """
    value = files.read_json(path)
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise InputError(f"{path} is no {FORMAT} file")
    return [Result(**row) for row in value["rows"]]


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
