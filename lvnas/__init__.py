"""Mixed-rank LoRA for vision-language models: search, derive, pack, serve, load-test."""

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """`lvnas.find_ranks`, imported when first used: it needs torch."""
    if name == "find_ranks":
        # importlib, since `from lvnas.find_ranks import` would bind the module under the function's name.
        import importlib

        function = importlib.import_module("lvnas.find_ranks").find_ranks
        globals()[name] = function
        return function
    raise AttributeError(f"module 'lvnas' has no attribute {name!r}")
