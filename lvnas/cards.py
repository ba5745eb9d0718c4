"""The model card (README.md) of a packed adapter, in the Hub's conventions."""

from collections import Counter
from typing import Any

CARD_NAME = "README.md"


def model_card(entry: dict[str, Any], base: str) -> str:
    """Markdown with the Hub's YAML head for the manifest entry `entry`; the same text on every machine."""
    counts = Counter(entry["ranks"].values())
    ranks = "\n".join(f"| {rank} | {counts[rank]} |" for rank in sorted(counts))
    task = f", fine-tuned for the task `{entry['task']}`" if entry["task"] else ""
    is_hub_id = base.count("/") == 1 and not base.startswith((".", "/", "~"))
    head = ["library_name: peft", "pipeline_tag: image-text-to-text", "tags: [lora, peft, vllm, lvnas]"]
    if is_hub_id:
        head.insert(0, f"base_model: {base}\nbase_model_relation: adapter")
    layout = entry["provenance"]["options"]["layout"]
    scale = entry["scaling"]["scale"] if entry["scaling"]["convention"] != "per-module" else "one per module"
    features, rows = (entry[key] or "not recorded" for key in ("vision_features", "pre_image_rows"))
    return f"""---
{chr(10).join(head)}
---
# {entry["name"]}

A LoRA adapter of `{base}`{task}, packed by lvnas in layout `{layout}`.

- {entry["parameters"]:,} parameters on {len(entry["ranks"])} modules
- {entry["bytes"]:,} bytes, {entry["dtype"]}
- scale: {scale} ({entry["scaling"]["convention"]})
- serve with vLLM: `--enable-lora --max-lora-rank {entry["max_rank"]}`
- vision features: {features}; rows before the image: {rows}
- SHA-256 of adapter_model.safetensors: `{entry["sha256"]}`

| rank | modules |
|---|---|
{ranks}
"""
