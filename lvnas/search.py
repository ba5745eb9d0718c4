"""A search: runs a strategy on two streams of batches and keeps what it found in a folder.

The folder holds `scores.json` (the gain of every rank block), and `update.safetensors` (the trained A and B, for
`derive` to inherit) if the method trains. While a search runs it holds `state.pt` instead, from which an
interrupted search goes on to bit-identical scores.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import nn

from lvnas import distributed, files
from lvnas.adapters import METADATA_NAME
from lvnas.checkpoint import load_state, save_state
from lvnas.errors import InputError
from lvnas.progress import track
from lvnas.strategies import Gains, SearchConfig, Strategy, make_strategy
from lvnas.strategies.base import NonFiniteLoss, Stream

FORMAT = "lvnas-scores/1"
SCORES, UPDATE, STATE = "scores.json", "update.safetensors", "state.pt"
MEAN = "mean.json"
"""The mean gains of a search that was repeated with other seeds, in the format of `scores.json`."""


class Shuffled:
    """A split's batches in an order that follows from the seed alone: every epoch is a new permutation."""

    def __init__(
        self, examples: Sequence[Any], collate: Callable[[list], Mapping[str, Any]], size: int, seed: int
    ) -> None:
        if len(examples) < size:
            raise InputError(f"batch size {size} is more than the split's {len(examples)} examples")
        self.examples, self.collate, self.size, self.seed = examples, collate, size, seed

    def __getitem__(self, index: int) -> tuple[Mapping[str, Any], list[int]]:
        epoch, place = divmod(index, len(self.examples) // self.size)
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.examples))
        ids = order[place * self.size : (place + 1) * self.size].tolist()
        ids = distributed.share(ids)
        return self.collate([self.examples[i] for i in ids]), ids


def fit(
    strategy: Strategy,
    train: Stream,
    search: Stream,
    *,
    state_path: Path | None = None,
    identity: Mapping[str, Any] | None = None,
    save_every: int = 20,
    title: str | None = None,
) -> list[float]:
    """Steps `strategy` to its end; returns the loss of every step.

    Args:
        train: for the weights.
        search: the search-validation split, for what chooses the ranks.
        state_path: where to keep the state; if it exists, the search goes on from it.
        identity: what the search is; a state of another one is refused.
        save_every: steps between two states; the most that an interruption loses.
        title: of the progress bar; no bar if None.

    Raises:
        InputError: a loss that is not finite (state saved), or a state of another search.
    """
    losses = []
    if state_path and state_path.exists():
        losses = _load(strategy, state_path, identity)
    left = range(len(losses), strategy.steps)
    bar = track(left, title) if title and left and distributed.is_first() else None
    for index in bar or left:
        try:
            losses.append(strategy.step(index, train, search))
        except NonFiniteLoss as error:
            if state_path:
                _save(strategy, losses, state_path, identity)
            kept = f"; the state before it is in {state_path}" if state_path else ""
            raise InputError(
                f"step {index}: {error}; lower the learning rate or look at those examples{kept}"
            ) from None
        if bar:
            bar.note(f"loss {losses[-1]:.3f}")
        if state_path and (index + 1) % save_every == 0:
            _save(strategy, losses, state_path, identity)
    return losses


def run(
    model: nn.Module,
    train: Stream,
    search: Stream,
    config: SearchConfig,
    out: Path,
    *,
    save_every: int = 20,
    title: str | None = None,
    **about: Any,
) -> Gains:
    """The gains of a whole search, kept in the folder `out`; a finished one is read again, not repeated.

    Args:
        about: what else the search is (its base, its data), recorded in the folder.

    Raises:
        InputError: see `fit`; or `out` holds a search with other settings, or an adapter.
    """
    out = Path(out)
    if (out / METADATA_NAME).exists():
        raise InputError(f"{out} holds an adapter: choose another --out")
    identity = {**about, "config": dataclasses.asdict(config)}
    if (out / SCORES).exists():
        saved = files.read_json(out / SCORES)
        _check_same(saved, identity, out / SCORES)
        if distributed.is_first():
            _clean(out)
        return read_gains(saved)
    files.check_out(out)
    torch.manual_seed(config.seed)
    strategy = make_strategy(model, config)
    saving: Any = {"state_path": out / STATE, "identity": identity, "save_every": save_every}
    losses = fit(strategy, train, search, title=title, **saving)
    gains = gains_of(strategy)
    update = {
        f"{name}.{side}": matrix.contiguous().cpu()
        for name, pair in strategy.update().items()
        for side, matrix in zip("AB", pair, strict=True)
    }
    if distributed.is_first():
        (out / UPDATE).unlink(missing_ok=True)  # of a search whose scores were deleted
        if update:
            files.write_bytes(out / UPDATE, safetensors.torch.save(update, {"scale": str(config.scale)}))
    strategy.close()
    if distributed.is_first():
        files.write_json(out / SCORES, _scores(gains, identity, losses))
        _clean(out)
    distributed.wait()
    return gains


def gains_of(strategy: Strategy) -> Gains:
    """The gains of a strategy at its end.

    Raises:
        InputError: one is not finite: a gradient overflowed although the losses did not.
    """
    try:
        gains = strategy.gains()
        finite = np.isfinite(gains.values).all(axis=1)
    except torch.linalg.LinAlgError:  # svd and score factor the weights
        finite = np.array([False])
    if not finite.all():
        where = [name for name, well in zip(strategy.shapes, finite, strict=False) if not well]
        raise InputError(
            f"the search of {strategy.name} ended with a gain that is not finite ({where[0]}); lower the learning rate "
            f"({strategy.config.learning_rate})"
        )
    return gains


def read_gains(scores: Mapping[str, Any]) -> Gains:
    """The gains in the value of a `scores.json`."""
    return Gains(
        shapes={name: tuple(shape) for name, shape in scores["shapes"].items()},
        ranks=scores["ranks"],
        values=np.array(scores["values"], dtype=np.float64),
        errors=np.array(scores["errors"], dtype=np.float64),
        chooses=scores["chooses"],
    )


def _scores(gains: Gains, identity: Mapping[str, Any], losses: Sequence[float]) -> dict[str, Any]:
    errors = gains.errors.astype(object)
    errors[np.isnan(gains.errors)] = None
    return {
        "format": FORMAT,
        **identity,
        "shapes": gains.shapes,
        "ranks": gains.ranks,
        "values": gains.values.tolist(),
        "errors": errors.tolist(),
        "chooses": gains.chooses,
        "losses": list(losses),
        "provenance": files.provenance(),
    }


def keep_mean(gains: Gains, identity: Mapping[str, Any], out: Path, first: Path) -> None:
    """Writes the mean gains of repeated searches into `out`, and the update of the search in `first`."""
    if distributed.is_first():
        (out / UPDATE).unlink(missing_ok=True)
        if (first / UPDATE).exists():
            files.write_bytes(out / UPDATE, (first / UPDATE).read_bytes())
        files.write_json(out / MEAN, _scores(gains, identity, losses=[]))
    distributed.wait()


def _save(strategy: Strategy, losses: list[float], path: Path, identity: Mapping[str, Any] | None) -> None:
    if not distributed.is_first():
        return
    state = {
        "identity": identity,
        "losses": losses,
        "random": torch.get_rng_state(),
        "cuda random": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "strategy": strategy.state(),
    }
    save_state(path, state)


def _clean(out: Path) -> None:
    """Removes the state of a search that has ended, and what a killed one left half-written."""
    (out / STATE).unlink(missing_ok=True)
    for name in (STATE, SCORES, UPDATE):
        for draft in out.glob(f".{name}.*"):
            draft.unlink(missing_ok=True)


def _load(strategy: Strategy, path: Path, identity: Mapping[str, Any] | None) -> list[float]:
    state = load_state(path)
    _check_same(state["identity"] or {}, identity or {}, path)
    strategy.restore(state["strategy"])
    torch.set_rng_state(state["random"])
    if state.get("cuda random"):
        torch.cuda.set_rng_state_all(state["cuda random"])
    return state["losses"]


def _check_same(saved: Mapping[str, Any], wanted: Mapping[str, Any], path: Path) -> None:
    """Refuses to go on with a search of other settings."""
    flat = {name: value for name, value in wanted.items() if name != "config"} | wanted.get("config", {})
    old = dict(saved) | saved.get("config", {})
    for name, value in flat.items():
        if old.get(name) != value:
            raise InputError(
                f"{path} is of a search with {name} {old.get(name)!r}, not {value!r}; "
                "use another --out or delete it"
            )
