"""Sizes of a base's linear modules, without its weights."""

from lvnas.bases.registry import meta_model


def linear_shapes(base: str) -> dict[str, tuple[int, int]]:
    """Module name -> (in_features, out_features) of every linear module of `base`.

    Raises:
        InputError: `base` is unknown or its configuration cannot be had.
    """
    from lvnas import modules

    return modules.linear_shapes(meta_model(base))
