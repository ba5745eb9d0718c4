"""What every search strategy shares: how it is set up, stepped, saved, and what it hands to the allocator.

Legend: N modules, K ranks in the space, R highest rank.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Protocol

import numpy as np
from torch import Tensor, nn

from lvnas import distributed
from lvnas.errors import InputError
from lvnas.modules import find_targets
from lvnas.supernet import Supernet, check_space


class Stream(Protocol):
    """Batches by number, without end: the same number is always the same batch."""

    def __getitem__(self, index: int) -> tuple[Mapping[str, Any], Sequence[int]]:
        """The inputs of `model(**inputs)`, with labels, and the ids of the examples in them."""


@dataclass(kw_only=True, slots=True)
class SearchConfig:
    """What a search is, apart from its data."""

    method: str = "score"
    """Name of a strategy."""
    targets: str = "all"
    """Groups or module names, comma-separated: `lvnas.modules.find_targets`."""
    ranks: list[int] = field(default_factory=lambda: [4, 8, 16, 32, 64])
    """The space."""
    scale: float = 1.0
    """Constant LoRA scaling s."""
    steps: int = 60
    """Training steps (mini-batches) of the strategy; strategies that do not train ignore it."""
    batch_size: int = 16
    """Examples per mini-batch."""
    learning_rate: float = 1e-3
    """AdamW's rate for A and B."""
    seed: int = 0
    """Of LoRA's initialisation and the order of the data."""
    options: dict[str, Any] = field(default_factory=dict)
    """The strategy's own options, see its `Options`."""


@dataclass(kw_only=True, slots=True)
class Gains:
    """What a strategy found: the gain of every rank block of every module."""

    shapes: dict[str, tuple[int, int]]
    """N module names -> (in_features, out_features)."""
    ranks: list[int]
    """The space, ascending."""
    values: np.ndarray
    """[N, K]: gain of going from ranks[k-1] (k = 0: from nothing) to ranks[k], in any unit that all modules
    share."""
    errors: np.ndarray
    """[N, K] standard errors of `values`; NaN where the strategy cannot tell."""
    chooses: bool = False
    """Whether the totals' argmax is a choice by itself, without a budget (the paper's mode)."""

    def totals(self) -> np.ndarray:
        """[N, K]: gain of each rank against nothing."""
        return np.cumsum(self.values, axis=1)

    def parameters(self) -> np.ndarray:
        """[N, K]: LoRA parameters of each choice."""
        return np.outer([sum(shape) for shape in self.shapes.values()], self.ranks)

    def inverted(self) -> "Gains":
        """The control that a search worth its name must lose to: every gain negated."""
        return Gains(shapes=self.shapes, ranks=self.ranks, values=-self.values, errors=self.errors)


class NonFiniteLoss(Exception):
    """A loss that is NaN or infinite; nothing was updated with it."""

    def __init__(self, loss: float, split: str, ids: Sequence[int]) -> None:
        super().__init__(f"loss is {loss} on {split} examples {', '.join(map(str, ids))}")


class Strategy(ABC):
    """A way to find gains. Made on a base model, stepped by `lvnas.search.fit`, then asked for its gains.

    Args:
        model: the base, without an adapter; `close` hands it back as it was.
        config: its options were checked against `Options`.
    """

    name: ClassVar[str]

    @dataclass(kw_only=True, slots=True)
    class Options:
        """A strategy's own options: a field each."""

    def __init__(self, model: nn.Module, config: SearchConfig) -> None:
        self.model = model
        self.config = config
        self.ranks = check_space(config.ranks)
        self.shapes = {
            n: (m.in_features, m.out_features) for n, m in find_targets(model, config.targets).items()
        }
        self.options: Any = read_options(self.Options, self.name, config.options)
        self.steps = 0
        """Number of calls of `step`."""

    def step(self, index: int, train: Stream, search: Stream) -> float:
        """Step `index` on data of the train and the search-validation split; returns the loss.

        Raises:
            NonFiniteLoss: before anything is updated.
        """
        raise NotImplementedError

    @abstractmethod
    def gains(self) -> Gains:
        """The gains after the last step."""

    def state(self) -> dict[str, Any]:
        """Everything that `step` changed: tensors and plain values, the model's own weights excepted."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:  # noqa: B027 - nothing to do without state
        """Takes back what `state` returned."""

    def update(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Module -> A [R, D] and B [O, R] that the search trained, for `derive` to inherit; empty if none."""
        return {}

    def close(self) -> nn.Module:
        """Takes everything off the model again and returns it."""
        return self.model

    def make_gains(self, values: Any, errors: Any = np.nan, *, chooses: bool = False) -> Gains:
        """`Gains` over this strategy's modules and space; `errors` is broadcast."""
        values = np.asarray(values, dtype=np.float64)
        errors = np.broadcast_to(np.asarray(errors, dtype=np.float64), values.shape).copy()
        return Gains(shapes=self.shapes, ranks=self.ranks, values=values, errors=errors, chooses=chooses)

    def blocks(self, dimensions: Any) -> np.ndarray:
        """Sums [..., R] over the rank blocks of the space: [..., K]."""
        dimensions = np.asarray(dimensions, dtype=np.float64)
        edges = [0, *self.ranks]
        return np.stack([dimensions[..., a:b].sum(axis=-1) for a, b in itertools.pairwise(edges)], axis=-1)


class SupernetStrategy(Strategy):
    """A strategy that trains a supernetwork."""

    def __init__(self, model: nn.Module, config: SearchConfig) -> None:
        super().__init__(model, config)
        self.net = Supernet(model, config.targets, config.ranks, scale=config.scale)
        distributed.copy_from_first(self.net.weights())

    def backward(self, split: str, batch: tuple[Mapping[str, Any], Sequence[int]]) -> float:
        """Loss of a batch, after its backward pass; only those on search-validation reach the gates."""
        inputs, ids = batch
        self.net.peft.train()
        self.net.watch_gates(split == "search")
        loss = self.net.loss(inputs)
        value = distributed.mean(loss.item())
        if not np.isfinite(value):
            raise NonFiniteLoss(value, split, distributed.gather(ids))
        loss.backward()
        distributed.average_gradients([*self.net.weights(), *self.net.gates.values()])
        return value

    def state(self) -> dict[str, Any]:
        return {"weights": [weight.detach() for weight in self.net.weights()]}

    def restore(self, state: dict[str, Any]) -> None:
        for weight, saved in zip(self.net.weights(), state["weights"], strict=True):
            weight.data.copy_(saved)

    def update(self) -> dict[str, tuple[Tensor, Tensor]]:
        pairs = {name: self.net.matrices(name) for name in self.shapes}
        return {name: (a.detach(), b.detach()) for name, (a, b) in pairs.items()}

    def close(self) -> nn.Module:
        return self.net.close()


def read_options(kind: type, name: str, given: Mapping[str, Any]) -> Any:
    """An instance of the options class `kind` from {name: value or text}.

    Raises:
        InputError: an option that the strategy does not have, or a value of another type.
    """
    known = {option.name: option for option in fields(kind)}
    values = {}
    for key, value in given.items():
        if key not in known:
            allowed = ", ".join(known) or "none"
            raise InputError(f"method {name!r} has no option {key!r}; allowed: {allowed}")
        kind_of_value: Any = known[key].type
        try:
            values[key] = kind_of_value(value)
        except (TypeError, ValueError):
            raise InputError(
                f"option {key}={value!r} of method {name!r}: expected {kind_of_value.__name__}"
            ) from None
    return kind(**values)
