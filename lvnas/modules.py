"""Which linear modules get a LoRA adapter, and what they are called.

Names are those of transformers >= 5 (`model.language_model.layers.0.self_attn.q_proj`); names from older
transformers and from PEFT state dicts are mapped to them.
"""

import re
from collections.abc import Iterable

from torch import nn

from lvnas.errors import InputError

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
GATED_MLP = ("gate_proj", "up_proj", "down_proj")
PLAIN_MLP = ("fc1", "fc2")

GROUPS: dict[str, tuple[str, ...]] = {
    "all": ATTENTION + GATED_MLP + PLAIN_MLP,
    "gud": GATED_MLP,
    "qk": ("q_proj", "k_proj"),
    "text": ATTENTION + GATED_MLP + PLAIN_MLP,
    "vision": ATTENTION + GATED_MLP + PLAIN_MLP,
}
"""Group -> the last parts of its modules' names. `text` and `vision` also look at where the module is."""

_VISION = re.compile(r"(^|\.)(vision_model|vision_tower|visual)\.")
_PREFIXES = ("base_model.model.",)
_RENAMES = (
    (re.compile(r"^vision_model\."), "model.vision_model."),
    (re.compile(r"^language_model\.model\."), "model.language_model."),
    (re.compile(r"^multi_modal_projector(?=\.|$)"), "model.multi_modal_projector"),
    (re.compile(r"^language_model\.lm_head(?=\.|$)"), "lm_head"),
)


def canonical_name(name: str) -> str:
    """`name` in transformers >= 5 form: PEFT's `base_model.model.` removed, pre-4.52 Mllama prefixes mapped."""
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    for old, new in _RENAMES:
        name = old.sub(new, name)
    return name


def parse_targets(targets: str | Iterable[str]) -> tuple[str, ...]:
    """`"all"`, `"gud"`, `"q_proj,fc1"` or a list of them -> the tuple of the names, whitespace removed.

    Raises:
        InputError: nothing is named.
    """
    parts = targets.split(",") if isinstance(targets, str) else targets
    names = tuple(part.strip() for part in parts if part.strip())
    if not names:
        raise InputError(
            f"no target modules named; allowed: {', '.join(GROUPS)} or module names, comma-separated"
        )
    return names


def is_vision(name: str) -> bool:
    """Whether a module's full name lies in the vision tower."""
    return _VISION.search(name) is not None


def find_targets(model: nn.Module, targets: str | Iterable[str] = "all") -> dict[str, nn.Linear]:
    """The linear modules that `targets` selects, by full name, in the model's order.

    Args:
        model: any model, also on the meta device and also one that PEFT has already wrapped.
        targets: group names, last parts of module names (`q_proj`), full names, or a mix.

    Raises:
        InputError: a target selects nothing; the message names the linear modules that the model has.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    selected: set[str] = set()
    for target in parse_targets(targets):
        chosen = {name for name in linears if _selects(target, name)}
        if not chosen:
            _refuse_other_kinds(model, target)
            suffixes = sorted({name.rpartition(".")[2] for name in linears})
            raise InputError(
                f"targets {target!r} match no linear module of this model; groups: {', '.join(GROUPS)}; "
                f"its modules: {', '.join(suffixes)}"
            )
        selected |= chosen
    return {name: module for name, module in linears.items() if name in selected}


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Module name -> (in_features, out_features) of every linear module of `model`."""
    return {
        name: (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }


def _refuse_other_kinds(model: nn.Module, target: str) -> None:
    """Raises InputError if `target` names modules that are there but are not linear ones."""
    for name, module in model.named_modules():
        if _selects(target, name) and not any(module.children()):
            raise InputError(
                f"{name} is a {type(module).__name__}; LoRA's ranks can be had for torch.nn.Linear, quantised by "
                "bitsandbytes or torchao too, not for other layers (GPTQ, AWQ, HQQ, Conv1D, ...)"
            )


def _selects(target: str, name: str) -> bool:
    if (target == "text" and is_vision(name)) or (target == "vision" and not is_vision(name)):
        return False
    wanted = GROUPS.get(target, (target,))
    return name.rpartition(".")[2] in wanted or name == canonical_name(target)


def rank_pattern_key(name: str) -> str:
    """The `rank_pattern` key that matches exactly the module `name`.

    PEFT searches `rf"(.*\\.)?({key})$"` and takes the first key that matches, so that a bare suffix such as
    `layers.0.self_attn.q_proj` would also match the other towers' layers: `^` anchors, dots are escaped.
    """
    return "^" + re.escape(name)


def module_of_key(key: str) -> str:
    """The module name of a key that `rank_pattern_key` made (or of a plain one)."""
    return canonical_name(re.sub(r"\\(.)", r"\1", key.removeprefix("^").removesuffix("$")))
