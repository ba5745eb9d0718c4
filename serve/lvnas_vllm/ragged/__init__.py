"""Ragged-rank LoRA: memory and work follow each module's own rank."""
