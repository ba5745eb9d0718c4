"""Search strategies: the paper's, ours, and the baselines, behind one interface (`lvnas.strategies.base`)."""

import importlib

from torch import nn

from lvnas.errors import unknown
from lvnas.strategies.base import Gains, SearchConfig, Strategy

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
    check_method(config.method)
    module, _, name = STRATEGIES[config.method].partition(":")
    return getattr(importlib.import_module(f"lvnas.strategies.{module}"), name)(model, config)


def check_method(method: str) -> None:
    """Raises InputError unless `method` names a strategy."""
    if method not in STRATEGIES:
        raise unknown("method", method, STRATEGIES)


__all__ = ["CHOOSING", "STRATEGIES", "Gains", "SearchConfig", "Strategy", "check_method", "make_strategy"]
