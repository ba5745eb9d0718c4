"""`lvnas derive`: a rank plan -> a standard PEFT adapter folder, untrained or inherited from the search.

Legend: D input, O output, R highest rank of the search, r rank of a module.
"""

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from peft import LoraConfig
from torch import Tensor

from lvnas import files
from lvnas.adapter_config import CONFIG_NAME
from lvnas.adapters import METADATA_FORMAT, METADATA_NAME, WEIGHTS_NAME, read_metadata
from lvnas.errors import InputError
from lvnas.modules import linear_shapes, rank_pattern_key
from lvnas.ranks import RankPlan, check_scaling
from lvnas.supernet import factor

NEGLIGIBLE = 1e-6
"""Singular values below this share of the largest are rounding errors of an update that does not have them."""


def derive(
    plan: RankPlan,
    shapes: Mapping[str, tuple[int, int]],
    out: Path,
    *,
    update: Path | None = None,
    seed: int = 0,
    features: Mapping[str, str] | None = None,
) -> None:
    """Writes the adapter folder `out` for `plan`; modules of rank 0 get no adapter.

    Restarting: A is PEFT's default (Kaiming uniform), B is 0. Inheriting: A and B are the best rank-r
    approximation (by SVD) of the update that the search trained, at each module's scaling.

    Args:
        shapes: module name -> (in_features, out_features) of the base.
        update: `update.safetensors` of the search to inherit from.
        seed: of A.
        features: further facts for `lvnas.json`, such as {"vision_features": "reference"}.

    Raises:
        InputError: no module has a rank, a rank or module that does not fit the base, or an update of other
        modules.
    """
    parameters = plan.parameters(shapes)
    _refuse_adapter(out)
    files.check_out(out)
    if parameters == 0:
        raise InputError("every rank of the plan is 0; an adapter needs at least one module")
    trained, scale = _read_update(update) if update else ({}, plan.scale)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, rank in plan.ranks.items():
        if rank == 0:
            continue
        if update:
            a, b = _read_pair(trained, name, rank, shapes[name], update)
            a, b = _truncated(a, b, rank, scale / plan.scale_of(rank), generator)
        else:
            a, b = _initial(shapes[name], rank, generator)
        tensors[f"base_model.model.{name}.lora_A.weight"] = a
        tensors[f"base_model.model.{name}.lora_B.weight"] = b
    with files.atomic_folder(out) as folder:
        _write_config(lora_config(plan), folder)
        weights = safetensors.torch.save(tensors, {"format": "pt"})
        files.write_bytes(folder / WEIGHTS_NAME, weights)
        facts = {"format": METADATA_FORMAT, **(features or {}), "task": plan.task, "base": plan.base}
        made = files.provenance(
            method=plan.method,
            parameters=parameters,
            start="inherit" if update else "restart",
            derived_sha256=hashlib.sha256(weights).hexdigest(),
            seed=seed,
            search=dict(plan.provenance),
        )
        files.write_json(folder / METADATA_NAME, facts | {"provenance": made})


def _refuse_adapter(out: Path) -> None:
    """Lets `derive` replace only what `derive` made and nobody has changed."""
    files.refuse_foreign(out, METADATA_NAME, CONFIG_NAME, WEIGHTS_NAME)
    weights = out / WEIGHTS_NAME
    if weights.exists():
        made = read_metadata(out).get("provenance", {})
        if made.get("derived_sha256") != files.sha256(weights):
            raise InputError(f"{out} holds a trained or packed adapter: choose another --out or remove it")


def derive_file(
    ranks: Path,
    out: Path,
    *,
    base: str | None = None,
    inherit: bool = False,
    seed: int = 0,
    scaling: str | None = None,
) -> dict[str, Any]:
    """`derive` for a ranks file: shapes from its base on the meta device, the update from its folder.

    `scaling` takes the place of the file's convention.

    Returns:
        The adapter in numbers: folder, parameters, modules.

    Raises:
        InputError: see `derive`; or neither the file nor `base` names a base.
    """
    from lvnas.bases import meta_model

    plan = RankPlan.read(ranks)
    plan.base = base or plan.base
    plan.scaling = check_scaling(scaling or plan.scaling)
    if plan.base is None:
        raise InputError(f"{ranks} names no base; give one with --base")
    model: Any = meta_model(plan.base)
    shapes = linear_shapes(model)
    # How `lvnas.bases.load` computes Mllama, on which search and fine-tuning run.
    mllama = {"vision_features": "reference", "pre_image_rows": "transformers"}
    features = mllama if model.config.model_type == "mllama" else {}
    update = Path(ranks).parent / "update.safetensors" if inherit else None
    derive(plan, shapes, out, update=update, seed=seed, features=features)
    return {
        "adapter": str(out),
        "parameters": plan.parameters(shapes),
        "modules": sum(rank > 0 for rank in plan.ranks.values()),
    }


def lora_config(plan: RankPlan) -> LoraConfig:
    """The plan as a `peft.LoraConfig`: every module's rank and alpha under an anchored full name."""
    ranks = {name: rank for name, rank in plan.ranks.items() if rank > 0}
    rslora = plan.scaling == "rslora"

    def alpha(rank: int) -> Any:
        return _number(plan.scale_of(rank) * (math.sqrt(rank) if rslora else rank))

    highest = max(ranks.values(), default=1)
    # PEFT takes a target for every module whose name ends like it: `layers.0.q_proj` for `vision.layers.0.q_proj` too.
    others = [
        name for name in plan.ranks if name not in ranks and any(name.endswith(f".{one}") for one in ranks)
    ]
    return LoraConfig(
        base_model_name_or_path=plan.base,
        r=highest,
        lora_alpha=alpha(highest),
        target_modules=sorted(ranks),
        rank_pattern={rank_pattern_key(name): rank for name, rank in ranks.items()},
        alpha_pattern={rank_pattern_key(name): alpha(rank) for name, rank in ranks.items()},
        exclude_modules=others or None,
        use_rslora=rslora,
    )


def _write_config(config: LoraConfig, folder: Path) -> None:
    """PEFT's adapter_config.json; the module names in order, so that the same plan gives the same bytes."""
    config.inference_mode = True
    config.save_pretrained(str(folder))
    path = folder / "adapter_config.json"
    value = files.read_json(path)
    files.write_json(path, value | {"target_modules": sorted(value["target_modules"])})


def _initial(shape: tuple[int, int], rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A [r, D] and B [O, r] as PEFT initialises them."""
    a = torch.empty(rank, shape[0])
    torch.nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
    return a, torch.zeros(shape[1], rank)


def balanced(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A [R, D] and B [O, R] of the same B A along its singular directions, largest first, of equal norms."""
    u, sigma, vt = factor(b, a)
    root = sigma.sqrt()
    return root[:, None] * vt, u * root


def _truncated(
    a: Tensor, b: Tensor, rank: int, ratio: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A [r, D] and B [O, r] of the `rank` largest singular directions of `ratio` * B A.

    Directions that the update does not have start as in a fresh adapter: with A and B both 0 they could not train.
    """
    a, b = balanced(a, b)
    a, b = a[:rank] * math.sqrt(ratio), b[:, :rank] * math.sqrt(ratio)
    sizes = a.square().sum(dim=1)
    if (missing := sizes <= NEGLIGIBLE * sizes.max()).any():
        fresh, zero = _initial((a.shape[1], b.shape[0]), rank, generator)
        a, b = torch.where(missing[:, None], fresh, a), torch.where(missing, zero, b)
    return a.contiguous(), b.contiguous()


def _read_pair(
    trained: Mapping[str, Tensor], name: str, rank: int, shape: tuple[int, int], path: Path
) -> tuple[Tensor, Tensor]:
    """The update's A [R, D] and B [O, R] of a module."""
    if f"{name}.A" not in trained or f"{name}.B" not in trained:
        raise InputError(f"{path} has no update of {name}; it is of a search with other targets")
    a, b = trained[f"{name}.A"], trained[f"{name}.B"]
    if rank > a.shape[0]:
        raise InputError(f"{name} has rank {rank}, more than the rank {a.shape[0]} of the update in {path}")
    if (a.shape[1], b.shape[0]) != tuple(shape):
        raise InputError(
            f"{path}: {name} is {a.shape[1]} x {b.shape[0]}, the base's is {shape[0]} x {shape[1]}"
        )
    return a, b


def _read_update(path: Path) -> tuple[dict[str, Tensor], float]:
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata: Any = file.metadata() or {}
            return {key: file.get_tensor(key).float() for key in file.keys()}, float(metadata["scale"])  # noqa: SIM118
    except FileNotFoundError:
        raise InputError(f"no such file: {path}; a method that trains nothing leaves no update") from None
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise InputError(f"{path} is no update of a search: {error}") from None


def _number(value: float) -> Any:
    """Whole numbers as int: older readers of adapter_config.json expect them."""
    return round(value) if abs(value - round(value)) < 1e-12 * abs(value) else value
