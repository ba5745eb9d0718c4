"""Random-weight stand-ins for load tests: a base of any width, and adapters of uniform and of mixed ranks.

    python benchmarks/loadtest/stand_ins.py --out FOLDER --width 1024 --layers 10 --adapters 8
    python benchmarks/loadtest/stand_ins.py --out FOLDER --width 11b --ranks published_ranks.json

Speed and memory depend on shapes and ranks, not on what the weights mean. With `--width 11b` only the configuration
and the tokenizer are written: start vLLM with `--load-format dummy`.
"""

import argparse
import random
from pathlib import Path

import safetensors.torch
import torch
from transformers import MllamaConfig

from lvnas.bases.tiny import _initialised, tiny_config
from lvnas.bases.tiny_processor import VOCABULARY, build_processor, save_processor
from lvnas.derive import derive
from lvnas.files import atomic_folder
from lvnas.modules import find_targets
from lvnas.ranks import RankPlan, uniform

SPACE = (4, 8, 16, 32, 64)


def write_base(folder: Path, width: str, layers: int) -> None:
    """A base with random weights: tiny's architecture at another width, or the 11B shapes without weights."""
    if width == "11b":
        processor = build_processor([], tile=560, max_tiles=4)
        config = MllamaConfig(image_token_index=VOCABULARY)
    else:
        processor = build_processor([], tile=32, max_tiles=2)
        config = tiny_config(processor)
        text, size = config.text_config, int(width)
        text.hidden_size, text.intermediate_size = size, 2 * size
        text.num_hidden_layers, text.cross_attention_layers = layers, list(range(3, layers, 5))
        text.num_attention_heads, text.num_key_value_heads = size // 64, max(1, size // 128)
        text.initializer_range = 0.02
    with atomic_folder(folder) as draft:
        save_processor(processor, draft)
        if width == "11b":
            config.architectures = ["MllamaForConditionalGeneration"]
            for part in (config, config.text_config):
                part.dtype = torch.bfloat16
            config.save_pretrained(draft)
        else:
            torch.manual_seed(0)
            _initialised(config).save_pretrained(draft)


def write_adapter(
    folder: Path, base: Path, plan: RankPlan, shapes: dict[str, tuple[int, int]], seed: int
) -> None:
    """An adapter of `plan` whose B is random too, so that each adapter answers differently."""
    plan.base = str(base)
    derive(plan, shapes, folder, seed=seed)
    path, generator = folder / "adapter_model.safetensors", torch.Generator().manual_seed(seed)
    tensors = safetensors.torch.load_file(path)
    for name, tensor in tensors.items():
        if "lora_B" in name:
            tensor.normal_(0.0, 0.5 / tensor.shape[1] ** 0.5, generator=generator)  # as strong at every rank
    dtype = torch.bfloat16 if sum(tensor.numel() for tensor in tensors.values()) > 5e7 else torch.float32
    safetensors.torch.save_file({name: t.to(dtype) for name, t in tensors.items()}, path, {"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base", help="an existing base (name or folder) instead of --width")
    parser.add_argument("--width", default="1024", help="hidden size of the text model, or 11b")
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument(
        "--ranks", type=Path, help="rank plan of the mixed adapters; by default drawn from 4..64"
    )
    options = parser.parse_args()
    from lvnas import bases

    base = options.out / "base"
    if options.base:
        base = Path(bases.resolve(options.base))
    elif not base.exists():
        write_base(base, options.width, options.layers)
    targets = find_targets(bases.meta_model(options.base or str(base)), "all")
    shapes = {name: (module.in_features, module.out_features) for name, module in targets.items()}
    for number in range(options.adapters):
        rng = random.Random(number)
        given = RankPlan.read(options.ranks).ranks if options.ranks else {}
        ranks = {name: given.get(name) or rng.choice(SPACE) for name in shapes}
        mixed = RankPlan(ranks=ranks, method="random", space=list(SPACE))
        for kind, plan in (("mixed", mixed), ("uniform", uniform(list(shapes), 64))):
            folder = options.out / kind / f"task{number}"
            if not folder.exists():
                write_adapter(folder, base, plan, shapes, number)
                print(f"{folder}: {plan.parameters(shapes):,} parameters", flush=True)


if __name__ == "__main__":
    main()
