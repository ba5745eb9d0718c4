"""Baselines that look at no data: uniform ranks, random ranks, ranks for one kind of module.

Their gains are made so that the allocator's optimum at any budget is the plan that the baseline means: a
gain of a module's parameters per rank times v makes the allocator compare modules by v alone, whatever their
size.
"""

from dataclasses import dataclass

import numpy as np

from lvnas.modules import find_targets
from lvnas.strategies.base import Gains, Strategy


class Uniform(Strategy):
    """The same rank everywhere; if the budget lies between two ranks, random modules get the higher one."""

    name = "uniform"

    def gains(self) -> Gains:
        return self.make_gains(self._filled(np.zeros(len(self.shapes))), 0.0)

    def _filled(self, preference: np.ndarray) -> np.ndarray:
        """[N, K] gains that fill rank by rank, the modules of higher `preference` [N] first."""
        sizes = np.array([sum(shape) for shape in self.shapes.values()], dtype=np.float64)
        width = np.diff(self.ranks, prepend=0)
        order = np.arange(len(self.ranks))[::-1]
        tie = np.random.default_rng(self.config.seed).random((len(self.shapes), 1))
        return sizes[:, None] * width * (preference[:, None] + order + 0.1 * tie)


class Type(Uniform):
    """Uniform ranks for one group of modules; the others get what the budget leaves over."""

    name = "type"

    @dataclass(kw_only=True, slots=True)
    class Options:
        group: str = "text"
        """Which modules: as `targets`."""

    def gains(self) -> Gains:
        chosen = find_targets(self.model, self.options.group)
        preference = np.array([float(name in chosen) for name in self.shapes])
        return self.make_gains(self._filled(2.0 * len(self.ranks) * preference), 0.0)


class Random(Strategy):
    """A random plan of the budget: the maximum-entropy distribution, p(rank) proportional to exp(-c rank).

    Perturb-and-MAP: with Gumbel noise as the gain of each rank, the best plan within a budget is a draw from
    it and the allocator's Lagrange multiplier is c. `seed` is the draw.
    """

    name = "random"

    def gains(self) -> Gains:
        sizes = np.array([sum(shape) for shape in self.shapes.values()], dtype=np.float64)
        noise = np.random.default_rng(self.config.seed).gumbel(size=(len(self.shapes), len(self.ranks)))
        return self.make_gains(np.diff(sizes[:, None] * noise, axis=1, prepend=0.0), 0.0)
