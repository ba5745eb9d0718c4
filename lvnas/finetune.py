"""`lvnas finetune`: trains a derived adapter on its task, end to end, with Accelerate.

Every module's A and B at their own ranks are trained together; the base stays frozen (LangVision-LoRA-NAS,
section 3.3: fine-tuning of the derived model).
"""

import hashlib
import math
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from peft import PeftModel
from torch import nn

from lvnas import bases, checkpoint, files, tasks
from lvnas.adapters import METADATA_FORMAT, METADATA_NAME, check_base, read_adapter, read_metadata
from lvnas.errors import InputError, check_above_zero, check_counts, check_seed
from lvnas.modules import linear_shapes
from lvnas.progress import track
from lvnas.tasks.batches import make_loader

STATE = "finetune.pt"


@dataclass(kw_only=True, slots=True)
class FinetuneConfig:
    """How an adapter is fine-tuned."""

    steps: int = 200
    """Optimiser steps."""
    batch_size: int = 16
    """Examples per step and process."""
    learning_rate: float = 2e-4
    """Peak of AdamW's rate (`tiny` wants 2e-3): linear warm-up over the first 5% of the steps, cosine to 0."""
    weight_decay: float = 0.0
    """AdamW's."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    seed: int = 0
    """Of the data's order and of dropout."""
    dtype: str = "auto"
    """Of the base's weights; A and B are float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    save_every: int = 100
    """Steps between two saved states; the most that an interruption loses."""

    def __post_init__(self) -> None:
        check_counts(steps=self.steps, batch_size=self.batch_size, save_every=self.save_every)
        check_above_zero(learning_rate=self.learning_rate)
        check_seed(self.seed)
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise InputError(f"weight decay {self.weight_decay} is not a number from 0 on")


def finetune(
    adapter: Path, task: str, out: Path, config: FinetuneConfig, *, base: str | None = None
) -> dict[str, Any]:
    """Fine-tunes the adapter folder `adapter` on the train split of `task` and writes the folder `out`.

    While it runs, `out` holds only the state to resume from; the same call then goes on exactly where it was.

    Returns:
        What `out`/lvnas.json records of the run: losses, seconds per epoch, parameters.

    Raises:
        InputError: no such adapter, base or task; an interrupted run with another configuration in `out`; a loss
            that is not finite.
    """
    adapter, out = Path(adapter), Path(out)
    facts = read_facts(adapter)
    base = base or facts.get("base")
    if base is None:
        raise InputError(f"{adapter} does not say which base it is for; give it with --base")
    data = tasks.load_task(task)
    identity: dict[str, Any] = {
        "adapter": _digest(adapter, facts),
        "task": task,
        "data_sha256": data.sha256("train"),
    }
    identity |= {"base": base, "config": asdict(config)}
    if (out / METADATA_NAME).exists():
        done = read_facts(out).get("finetune", {})
        if done.get("identity") == identity:
            return done
        raise InputError(f"{out} already holds another adapter; choose a new --out or remove it")
    files.refuse_foreign(out, STATE)
    files.check_out(out)
    accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True))
    set_seed(config.seed)
    model, processor = bases.load(
        base, dtype=config.dtype, vision_features=facts.get("vision_features", "reference")
    )
    model = load_adapter(model, adapter, trainable=True)
    if config.gradient_checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable()
    run = _Run(
        accelerator,
        model,
        make_loader(data.splits["train"], processor, config.batch_size, shuffle=True),
        config,
    )
    report = run.train(out, identity, f"fine-tuning {adapter.name} on {task}")
    if accelerator.is_main_process:
        _save(accelerator.unwrap_model(run.model), adapter, out, facts, base, task, identity, report)
    accelerator.wait_for_everyone()
    return {"identity": identity, **report}


def load_adapter(model: nn.Module, adapter: Path, *, trainable: bool = False) -> PeftModel:
    """`model` with the adapter folder's weights on it.

    Raises:
        InputError: the folder is no adapter that could be packed (`lvnas.adapters.read_adapter`), or does not fit the
            model.
    """
    found = read_adapter(Path(adapter), name="adapter")
    check_base(found, linear_shapes(model), "this base")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # they come below
            peft_model = PeftModel.from_pretrained(model, str(adapter), is_trainable=trainable)
    except (ValueError, RuntimeError, OSError) as error:
        raise InputError(f"adapter {adapter} does not fit this base: {error}") from None
    if not found.config.adalora:
        # PEFT passes over tensors that are called as in older releases of transformers.
        for name, module in found.modules.items():
            layer: Any = peft_model.get_submodule(f"base_model.model.{name}")
            with torch.no_grad():
                for target, value in zip(_matrices(layer, name, adapter), module.factors(), strict=True):
                    target.copy_(value)
    return peft_model


def _matrices(layer: Any, name: str, adapter: Path) -> tuple[nn.Parameter, nn.Parameter]:
    """A and B that PEFT made for a module."""
    if not hasattr(layer, "lora_A"):
        raise InputError(f"adapter {adapter} does not fit this base: its configuration does not reach {name}")
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def read_facts(adapter: Path) -> dict[str, Any]:
    """`lvnas.json` of an adapter folder; empty for an adapter from elsewhere.

    Raises:
        InputError: there is no such folder, or the file is none of ours.
    """
    if not Path(adapter).is_dir():
        raise InputError(f"no such adapter folder: {adapter}")
    return read_metadata(Path(adapter))


def lora_parameters(model: nn.Module) -> int:
    """Number of LoRA parameters on `model`."""
    return sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)


class _Run:
    """The training loop: optimiser, schedule, and the state to resume from."""

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, loader: Any, config: FinetuneConfig
    ) -> None:
        self.accelerator, self.config = accelerator, config
        weights = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=config.learning_rate, weight_decay=config.weight_decay)
        self.model, self.optimizer, self.loader = accelerator.prepare(model, optimizer, loader)
        self.losses: list[float] = []
        self.seconds = 0.0

    def train(self, out: Path, identity: dict[str, Any], title: str) -> dict[str, Any]:
        """All steps that are left; returns the run in numbers."""
        state = out / STATE
        if state.exists():
            self._restore(checkpoint.load_state(state), identity, state)
        self.model.train()
        batches = self._batches(len(self.losses))
        bar = track(range(len(self.losses), self.config.steps), title)
        for step in bar:
            started = time.perf_counter()
            try:
                self.losses.append(self._step(step, next(batches)))
            except FloatingPointError as error:
                self._save(state, identity)
                raise InputError(
                    f"{title}: step {step}: {error}; the state before it is in {state}; lower the learning rate"
                ) from None
            self.seconds += time.perf_counter() - started
            bar.note(f"loss {sum(self.losses[-20:]) / len(self.losses[-20:]):.3f}")
            if (step + 1) % self.config.save_every == 0 and step + 1 < self.config.steps:
                self._save(state, identity)
        per_epoch = len(self.loader) / self.config.steps
        return {
            "parameters": lora_parameters(self.accelerator.unwrap_model(self.model)),
            "steps": self.config.steps,
            "epoch_seconds": self.seconds * per_epoch,
            "losses": self.losses,
        }

    def _step(self, step: int, batch: dict[str, torch.Tensor]) -> float:
        loss = self.model(**batch).loss
        value = self.accelerator.gather(loss.detach()).mean().item()
        if not torch.isfinite(torch.tensor(value)):
            raise FloatingPointError(f"the loss is {value}")
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * warmup_cosine(step, self.config.steps)
        self.optimizer.step()
        return value

    def _batches(self, start: int) -> Iterator[dict[str, torch.Tensor]]:
        """Batches from step `start` on; every epoch's order follows from the seed and the epoch."""
        epoch, skip = divmod(start, len(self.loader))
        while True:
            self.loader.set_epoch(epoch)
            loader = self.accelerator.skip_first_batches(self.loader, skip) if skip else self.loader
            yield from loader
            epoch, skip = epoch + 1, 0

    def _save(self, path: Path, identity: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            model = self.accelerator.unwrap_model(self.model)
            state = {
                "identity": identity,
                "weights": peft.get_peft_model_state_dict(model, save_embedding_layers=False),
                "optimizer": self.optimizer.state_dict(),
                "losses": self.losses,
                "seconds": self.seconds,
                "random": torch.get_rng_state(),
            }
            checkpoint.save_state(path, state)

    def _restore(self, state: dict[str, Any], identity: dict[str, Any], path: Path) -> None:
        if state["identity"] != identity:
            raise InputError(f"{path} is of a run with other settings; choose a new --out or remove it")
        peft.set_peft_model_state_dict(self.accelerator.unwrap_model(self.model), state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.losses, self.seconds = state["losses"], state["seconds"]
        torch.set_rng_state(state["random"])


def warmup_cosine(step: int, steps: int) -> float:
    """Factor of the learning rate at `step`: linear over the first 5%, then half a cosine down to 0."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + torch.cos(torch.tensor(torch.pi * (step - warmup) / max(1, steps - warmup))).item())


def _digest(adapter: Path, facts: dict[str, Any]) -> str:
    """Of what decides the training: weights, configuration, and how the base computes."""
    parts = [files.sha256(path) for path in read_adapter(adapter, name="adapter").files]
    return hashlib.sha256(repr((parts, facts.get("vision_features"))).encode()).hexdigest()


def _save(
    model: PeftModel,
    adapter: Path,
    out: Path,
    facts: dict[str, Any],
    base: str,
    task: str,
    identity: dict[str, Any],
    report: dict[str, Any],
) -> None:
    with files.atomic_folder(out) as folder:
        model.save_pretrained(str(folder), save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)
        # PEFT rewrites the configuration with a random order of modules; the derived one says the same.
        (folder / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
        made = files.provenance(derived=facts.get("provenance", {}))
        done = {"identity": identity, **report}
        facts = {"format": METADATA_FORMAT, **facts, "task": task, "base": base, "finetune": done}
        files.write_json(folder / METADATA_NAME, facts | {"provenance": made})
