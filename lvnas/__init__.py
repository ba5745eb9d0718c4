"""Mixed-rank LoRA for vision-language models: search, derive, pack, serve, load-test."""

__version__ = "0.1.0"
