"""PEFT's adapter_config.json: read, checked, and reduced to what decides a LoRA adapter's arithmetic.

Follows peft 0.21 (`tuners/lora/config.py`, `utils/other.py:get_pattern_key`): a `rank_pattern` key is a
regular expression matched at the end of a module's name from a dot on, the first key that matches wins.
"""

import math
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import regex

from lvnas.tensorfile import BrokenFile, check_regular_file, read_json_object, shorten

CONFIG_NAME = "adapter_config.json"
MAX_RANK = 1 << 14
PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")
"""Initialisations that leave the base as it is: the saved adapter is a plain LoRA."""
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "lora_ga")
"""Initialisations that subtract the initial adapter from the base: the saved one needs that changed base."""
PATTERN_SECONDS = 2.0
"""Processor time that each pattern option of a configuration may take; regular expressions can take for ever."""

_REFUSED = {
    "use_dora": ("dora", "vLLM has no DoRA; merge it into the base with PEFT's merge_and_unload"),
    "lora_bias": ("lora-bias", "vLLM has no bias on LoRA's B; merge it with PEFT"),
    "layer_replication": ("layer-replication", "the adapter changes the base's layers; merge it with PEFT"),
    "alora_invocation_tokens": ("alora", "an Activated LoRA applies only after its invocation tokens"),
    "use_qalora": ("qalora", "QALoRA pools its inputs; merge it with PEFT"),
    "use_bdlora": ("bdlora", "block-diagonal LoRA is no plain low-rank product; merge it with PEFT"),
    "kasa_config": ("kasa", "KaSA changes the base's weights; merge it with PEFT"),
    "monteclora_config": ("monteclora", "MonteCLoRA samples its weights; merge it with PEFT"),
    "arrow_config": ("arrow", "Arrow routes between adapters; pack them one by one"),
    "target_parameters": ("target-parameters", "LoRA on bare parameters (fused experts) is not supported"),
    "trainable_token_indices": ("trainable-tokens", "it changes token embeddings; merge it with PEFT"),
}  # fmt: skip
_HARMLESS = frozenset(
    (
        *(
            "alpha_pattern",
            "auto_mapping",
            "base_model_name_or_path",
            "beta1",
            "beta2",
            "bias",
            "corda_config",
        ),
        *(
            "deltaT",
            "ensure_weight_tying",
            "eva_config",
            "exclude_modules",
            "fan_in_fan_out",
            "inference_mode",
        ),
        *(
            "init_lora_weights",
            "init_r",
            "layers_pattern",
            "layers_to_transform",
            "loftq_config",
            "lora_alpha",
        ),
        *("lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "modules_to_save"),
        *(
            "orth_reg_weight",
            "peft_type",
            "peft_version",
            "qalora_group_size",
            "r",
            "rank_pattern",
            "revision",
        ),
        *("runtime_config", "target_modules", "target_r", "task_type", "tfinal", "tinit", "total_step"),
        *("use_rslora", "velora_config"),
    )
)


@dataclass(kw_only=True, slots=True)
class AdapterConfig:
    """What adapter_config.json says that matters after training."""

    path: Path
    adalora: bool
    r: int
    """Rank where `rank_pattern` names none; AdaLoRA: `init_r`, the divisor of its scale."""
    alpha: float
    rslora: bool
    rank_pattern: "Pattern"
    alpha_pattern: "Pattern"
    base: str | None
    task_type: str | None
    fan_in_fan_out: bool
    target_modules: "frozenset[str] | Pattern | None"
    """Names, or a regular expression for whole names; None where it does not restrict them."""
    modules_to_save: list[str]
    changed_base: str | None
    """The initialisation, if it changed the base (`pissa`...), else None."""
    notes: list[str] = field(default_factory=list)

    def rank(self, module: str) -> int:
        """The rank PEFT gives `module` (its name in the file)."""
        rank = self.rank_pattern.match(module)
        return self.r if rank is None else rank

    def scale(self, module: str, rank: int) -> float:
        """alpha / rank; with rsLoRA alpha / sqrt(rank); with AdaLoRA alpha / (init_r + 1e-5)."""
        if self.adalora:  # peft/tuners/adalora/layer.py: SVDLinear.get_delta_weight
            return (self.alpha if self.alpha > 0 else float(self.r)) / (self.r + 1e-5)
        alpha = self.alpha_pattern.match(module)
        alpha = self.alpha if alpha is None else alpha
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def selects(self, module: str) -> bool:
        """Whether PEFT's `target_modules` reaches `module`; PEFT drops weights that it does not reach."""
        targets = self.target_modules
        if targets is None:
            return True
        if isinstance(targets, Pattern):
            return targets.match(module) is not None
        return any(part in targets for part in _endings(module))


class Pattern:
    """Regular expressions for module names with a value each, matched in bounded time.

    Keys that are only a dotted name, the usual case, are looked up or compared: hundreds of keys meet hundreds of
    modules. The others go to a regular expression engine that can be stopped.
    """

    def __init__(self, path: Path, what: str, values: dict[str, Any], whole: bool = False) -> None:
        """`whole`: they match the whole name (`target_modules`), not its end (`rank_pattern`)."""
        self.path, self.whole = path, whole
        self._values = list(values.values())
        self.seconds = PATTERN_SECONDS
        self._names: dict[tuple[str, bool], int] = {}
        """(name, anchored) -> place of its key, for keys whose dots are escaped."""
        self._others: list[tuple[int, str, str | None]] = []
        """(place, key, its name if that is all it is but for unescaped dots), in order."""
        for place, key in enumerate(values):
            name = None if whole else _dotted_name(key)
            if name is None:
                _compile(path, what, key)
            if name is not None and ("." not in name or "\\." in key):
                self._names.setdefault((name, key.startswith("^")), place)
            else:
                self._others.append((place, key, name))

    def match(self, module: str) -> Any:
        """The value of the first key that matches `module`, or None.

        Raises:
            BrokenFile: its regular expressions have taken PATTERN_SECONDS in all.
        """
        found = [self._names.get((ending, False)) for ending in _endings(module)] if self._names else []
        found.append(self._names.get((module, True)))
        first = min((place for place in found if place is not None), default=len(self._values))
        for place, key, name in self._others:
            if place > first:
                break
            if self._ends(key, name, module) if name is not None else self._searches(key, module):
                first = place
                break
        return self._values[first] if first < len(self._values) else None

    def _ends(self, key: str, name: str, module: str) -> bool:
        """Whether `module` ends in `name` at a dot; each dot of `name` stands for any character."""
        cut = len(module) - len(name)
        if cut < 0 or (cut and (key.startswith("^") or module[cut - 1] != ".")):
            return False
        end = module[cut:]
        if end == name or end.count(".") == name.count("."):
            return end == name
        return all(wanted in (".", found) for wanted, found in zip(name, end, strict=True))

    def _searches(self, key: str, module: str) -> bool:
        if self.seconds <= 0:
            raise BrokenFile(
                self.path, "slow-pattern", f"its patterns take more than {PATTERN_SECONDS} s to match"
            )
        start = time.thread_time()
        try:
            if self.whole:
                return regex.fullmatch(key, module, timeout=self.seconds) is not None
            return regex.match(rf"(.*\.)?({key})$", module, timeout=self.seconds) is not None
        except TimeoutError:
            raise BrokenFile(
                self.path, "slow-pattern", f"{shorten(key)} takes too long to match {module}"
            ) from None
        except (regex.error, RecursionError, MemoryError) as error:
            raise BrokenFile(self.path, "bad-pattern", f"{shorten(key)}: {error}") from None
        finally:
            self.seconds -= time.thread_time() - start


def _compile(path: Path, what: str, key: str) -> None:
    try:
        if len(key) > 4096:
            raise regex.error("longer than 4096 characters")
        regex.compile(key)
    except (regex.error, OverflowError, RecursionError, MemoryError, ValueError) as error:
        raise BrokenFile(path, "bad-pattern", f"{what} key {shorten(key)}: {error}") from None


def _dotted_name(key: str) -> str | None:
    """The name if `key` is only that, its dots all escaped or all not, with or without ^ and $."""
    body = key.removeprefix("^").removesuffix("$")
    if not re.fullmatch(r"\w+(?:(?:\.\w+)*|(?:\\\.\w+)*)", body, re.ASCII):
        return None
    return body.replace("\\.", ".")


def read_config(folder: Path, inside: Path) -> AdapterConfig:
    """The configuration of the adapter in `folder`, whose files may link to nothing outside `inside`.

    Raises:
        BrokenFile: missing, malformed, or a kind of adapter that no plain LoRA can stand for.
    """
    path = folder / CONFIG_NAME
    check_regular_file(path, inside)
    return parse_config(path, read_json_object(path))


def parse_config(path: Path, raw: dict[str, Any]) -> AdapterConfig:
    """`raw`, the parsed content of `path`, checked; the errors of `read_config`."""
    method = raw.get("peft_type", "LORA")
    if method not in ("LORA", "ADALORA"):
        raise BrokenFile(path, "unsupported-method", f"peft_type {shorten(method)}; supported: LORA, ADALORA")
    for option, (reason, advice) in _REFUSED.items():
        if raw.get(option):
            raise BrokenFile(path, reason, f"{option} is set: {advice}")
    if raw.get("bias", "none") != "none":
        raise BrokenFile(
            path, "bias", f"bias={shorten(raw['bias'])}: vLLM has no trained biases; merge it with PEFT"
        )
    adalora = method == "ADALORA"
    rank_field = "init_r" if adalora else "r"
    unknown = sorted(key for key in raw if key not in _HARMLESS and key not in _REFUSED and raw[key])
    return AdapterConfig(
        path=path,
        adalora=adalora,
        r=_rank(path, rank_field, raw.get(rank_field, 12 if adalora else 8)),
        alpha=_alpha(path, "lora_alpha", raw.get("lora_alpha", 8), zero=adalora),
        rslora=_flag(path, raw, "use_rslora"),
        rank_pattern=_rank_pattern(path, raw, adalora),
        alpha_pattern=_alpha_pattern(path, raw),
        base=_text(path, raw, "base_model_name_or_path"),
        task_type=_text(path, raw, "task_type"),
        fan_in_fan_out=_flag(path, raw, "fan_in_fan_out"),
        target_modules=_targets(path, raw.get("target_modules")),
        modules_to_save=_list(path, raw, "modules_to_save"),
        changed_base=_changed_base(path, raw.get("init_lora_weights", True)),
        notes=[f"option {shorten(key)} is not one of PEFT's and is ignored, as PEFT does" for key in unknown],
    )


def _rank(path: Path, what: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise BrokenFile(path, "bad-rank", f"{what} is {shorten(value)}, not a whole number")
    if value < 1:
        raise BrokenFile(path, "rank-below-one", f"{what} is {shorten(value)}; a rank is at least 1")
    if value > MAX_RANK:
        raise BrokenFile(path, "rank-too-large", f"{what} is {shorten(value)}; at most {MAX_RANK}")
    return value


def _alpha(path: Path, what: str, value: Any, zero: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e9:
        raise BrokenFile(path, "bad-alpha", f"{what} is {shorten(value)}, not a number between -1e9 and 1e9")
    if value == 0 and not zero:
        raise BrokenFile(path, "zero-alpha", f"{what} is 0: the adapter would do nothing")
    return float(value)


def _rank_pattern(path: Path, raw: dict[str, Any], adalora: bool) -> Pattern:
    values = _object(path, raw, "rank_pattern")
    if adalora:  # {module.lora_E: one boolean per initial rank}; the tensors are already cut to the true ones
        for key, mask in values.items():
            if not isinstance(mask, list) or not all(isinstance(kept, bool) for kept in mask):
                raise BrokenFile(
                    path, "bad-rank-pattern", f"AdaLoRA rank_pattern of {shorten(key)} must be booleans"
                )
        kept = {re.sub(r"\.lora_E(\.\w+)?$", "", key): sum(mask) for key, mask in values.items()}
        return Pattern(path, "rank_pattern", {re.escape(key): rank for key, rank in kept.items()})
    for key, rank in values.items():
        _rank(path, f"rank_pattern of {shorten(key)}", rank)
    return Pattern(path, "rank_pattern", values)


def _alpha_pattern(path: Path, raw: dict[str, Any]) -> Pattern:
    values = _object(path, raw, "alpha_pattern")
    return Pattern(
        path,
        "alpha_pattern",
        {k: _alpha(path, f"alpha_pattern of {shorten(k)}", v) for k, v in values.items()},
    )


def _changed_base(path: Path, init: Any) -> str | None:
    if init is None or isinstance(init, bool):
        return None
    name = init.lower() if isinstance(init, str) else ""
    if name in PLAIN_INITS:
        return None
    if name in BASE_CHANGING_INITS or re.fullmatch(r"pissa_niter_\d{1,4}", name):
        return name
    if name == "loftq":
        raise BrokenFile(
            path,
            "loftq",
            "fits only its own quantised base; if you serve that base, set init_lora_weights to true",
        )
    allowed = ", ".join(("true", "false", *PLAIN_INITS, *BASE_CHANGING_INITS))
    raise BrokenFile(path, "unknown-init", f"init_lora_weights {shorten(init)}; known: {allowed}")


def _object(path: Path, raw: dict[str, Any], key: str) -> dict[str, Any]:
    value = raw.get(key) or {}
    if not isinstance(value, dict):
        raise BrokenFile(path, "bad-option", f"{key} is {shorten(value)}, not an object")
    return value


def _flag(path: Path, raw: dict[str, Any], key: str) -> bool:
    value = raw.get(key) or False
    if not isinstance(value, bool):
        raise BrokenFile(path, "bad-option", f"{key} is {shorten(value)}, not true or false")
    return value


def _text(path: Path, raw: dict[str, Any], key: str) -> str | None:
    value = raw.get(key)
    if value is not None and (not isinstance(value, str) or not value.isprintable() or len(value) > 4096):
        raise BrokenFile(path, "bad-option", f"{key} is {shorten(value)}, not printable text")
    return value or None


def _list(path: Path, raw: dict[str, Any], key: str) -> list[str]:
    value = raw.get(key) or []
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise BrokenFile(path, "bad-option", f"{key} is {shorten(value)}, not a list of names")
    return value


def _targets(path: Path, value: Any) -> frozenset[str] | Pattern | None:
    if value is None or value == "all-linear":
        return None
    if isinstance(value, str):
        return Pattern(path, "target_modules", {value: True}, whole=True)
    return frozenset(_list(path, {"target_modules": value}, "target_modules"))


def _endings(module: str) -> list[str]:
    """`a.b.c` -> `a.b.c`, `b.c`, `c`."""
    parts = module.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]
