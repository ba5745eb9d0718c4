"""Search strategies: the paper's, ours, and the baselines, behind one interface (`lvnas.strategies.base`)."""

import importlib

from torch import nn

from lvnas.errors import unknown
from lvnas.strategies.base import Gains, SearchConfig, Strategy, read_options

STRATEGIES = {
    "darts": "darts:Darts",
    "score": "score:Score",
    "svd": "warm:Svd",
    "eva": "eva:Eva",
    "adalora": "adalora:AdaLora",
    "type": "fixed:Type",
    "uniform": "fixed:Uniform",
    "random": "fixed:Random",
}
"""Method name -> "module:class" in this package."""
CHOOSING = ("darts",)
"""Methods that train their choice on search-validation, every second batch, and need no budget; the others read
train alone."""


def make_strategy(model: nn.Module, config: SearchConfig) -> Strategy:
    """The strategy that `config.method` names, set up on `model`.

    Raises:
        InputError: unknown method or option, a bad space, or no matching modules.
    """
    return _find(config.method)(model, config)


def check_method(config: SearchConfig) -> None:
    """Raises InputError unless `config.method` names a strategy and `config.options` are options of it."""
    read_options(_find(config.method).Options, config.method, config.options)


def _find(method: str) -> type[Strategy]:
    if method not in STRATEGIES:
        raise unknown("method", method, STRATEGIES)
    module, _, name = STRATEGIES[method].partition(":")
    return getattr(importlib.import_module(f"lvnas.strategies.{module}"), name)


__all__ = ["CHOOSING", "STRATEGIES", "Gains", "SearchConfig", "Strategy", "check_method", "make_strategy"]
