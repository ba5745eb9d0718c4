"""Sizes of a base's linear modules, without its weights."""

from lvnas.bases.registry import meta_model


def linear_shapes(base: str) -> dict[str, tuple[int, int]]:
    """Module name -> (in_features, out_features) of every linear module of `base`.

    Raises:
        InputError: `base` is unknown or its configuration cannot be had.
    """
    from torch import nn

    modules = meta_model(base).named_modules()
    return {
        name: (module.in_features, module.out_features)
        for name, module in modules
        if isinstance(module, nn.Linear)
    }
