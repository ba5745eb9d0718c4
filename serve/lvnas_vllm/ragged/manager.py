"""vLLM's LoRA managers on the arena: registration packs and admits an adapter, activation writes its table.

On CPU an adapter is resident while it is registered: the registered copy is the arena's region. On a device
it is resident while it is active, and its registered copy is one pinned buffer, moved in one transfer.
"""

import itertools
import time
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

from lvnas_vllm.ragged import report
from lvnas_vllm.ragged.arena import Arena, Ledger, aligned
from lvnas_vllm.ragged.capacity import choose
from lvnas_vllm.ragged.layers import RaggedLayer
from lvnas_vllm.ragged.layout import Packed, pack, plan, ranks_of
from lvnas_vllm.ragged.torch_ops import SiteWeights
from lvnas_vllm.vllm_internals import ragged as vllm_internals

logger = init_logger("vllm.lvnas.ragged")


class DummyLoRA(LoRAModel):
    """An adapter of vLLM's start-up runs: it takes a slot and no rows."""


class RaggedModelManager(LRUCacheLoRAModelManager):
    """Keeps every covered layer's adapters in one arena, at their own ranks."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        vllm_internals.refuse_unserved_lora_options(self.lora_config)
        self.covered = {name: m for name, m in self.modules.items() if isinstance(m, RaggedLayer)}
        self.sites = [module.site(name) for name, module in self.covered.items()]
        self.shared = self.device.type == "cpu"
        self.packed: dict[int, Packed] = {}
        dtype, slots = self.lora_config.lora_dtype, self.capacity if self.shared else self.lora_slots
        padded = sum(module.padded_elements() for module in self.covered.values())
        highest = [[self.lora_config.max_lora_rank] * site.slices for site in self.sites]
        largest = aligned(plan(self.sites, highest)[1])
        self.room = choose(self.sites, slots, dtype.itemsize, slots * largest, self._place_of)
        commit = self.room.reserved or not self.shared
        self.arena = Arena.allocate(self.room.elements, dtype, self.device, commit)
        vllm_internals.mark_compiled_code(self.room.elements)
        self.ledger = Ledger(self.arena.capacity, slots)
        rows = sum(site.slices for site in self.sites)
        self.table = torch.zeros(rows, self.lora_slots, 3, dtype=torch.int64, device=self.device)
        row = 0
        for site, module in zip(self.sites, self.covered.values(), strict=True):
            rows_of_site = self.table[row : row + site.slices]
            module.weights = SiteWeights(self.arena.data, rows_of_site, site.inputs, site.outputs)
            row += site.slices
        # On CPU a registered adapter owns its region until it leaves the registry.
        self._registered_adapters.deactivate_fn = self._unregister
        for wrapper in self.punica_wrapper_mapping.values():
            wrapper.serves_padded = len(self.covered) < len(self.modules)
        report.start(self, padded * dtype.itemsize, kwargs["vllm_config"])

    def create_dummy_lora(self, *args: Any, **kwargs: Any) -> LoRAModel:
        dummy = super().create_dummy_lora(*args, **kwargs)
        return DummyLoRA(dummy.id, dummy.rank, dummy.loras)

    def _create_merged_loras_inplace(self, lora_model: LoRAModel) -> None:
        """vLLM's merging, then: checks, admission and packing. A refusal leaves everything as it was."""
        super()._create_merged_loras_inplace(lora_model)
        if isinstance(lora_model, DummyLoRA):
            return
        vllm_internals.refuse_vocabulary_lora(lora_model, self.model)
        weights = {name: self._get_lora_layer_weights(lora_model, name) for name in self.covered}
        pairs = [
            None if (lora := weights[name]) is None else module.pairs(lora.lora_a, lora.lora_b)
            for name, module in self.covered.items()
        ]
        ranks = ranks_of(self.sites, pairs)
        table, elements = plan(self.sites, ranks)
        if (rank := max(itertools.chain(*ranks), default=0)) > self.lora_config.max_lora_rank:
            # vLLM looks at the configuration only; the GPU's buffers have this many columns.
            raise ValueError(
                f"adapter refused: it has a module of rank {rank}, above --max-lora-rank "
                f"{self.lora_config.max_lora_rank}; raise that"
            )
        self.ledger.admit(lora_model.id, elements, self.arena.data.element_size())
        try:
            if self.shared:
                while self.arena.free < elements:
                    self.remove_oldest_adapter()
                self._rewrite(self.arena.take(lora_model.id, elements)[1])
                region = self.arena.region(lora_model.id)
            else:
                region = torch.empty(elements, dtype=self.arena.data.dtype, pin_memory=True)
            pack(self.sites, pairs, table, region)
        except BaseException:
            self.arena.give(lora_model.id)
            self.ledger.forget(lora_model.id)
            raise
        self.packed[lora_model.id] = Packed(table, None if self.shared else region, elements)
        for lora in filter(None, weights.values()):
            lora.lora_a = lora.lora_b = None

    def activate_adapter(self, lora_id: int) -> bool:
        """vLLM's activation, then the table; a failure leaves the adapter inactive and its slot empty."""
        if lora_id in self._active_adapters:
            return super().activate_adapter(lora_id)
        try:
            result = super().activate_adapter(lora_id)
            self._bring_in(lora_id)
        except BaseException:
            self._active_adapters.pop(lora_id, None)
            self._deactivate_adapter(lora_id)
            raise
        return result

    def _bring_in(self, lora_id: int) -> None:
        packed = self.packed.get(lora_id)
        if packed is None:
            return
        if not self.shared:
            start, moved = self.arena.take(lora_id, packed.elements)
            self._rewrite(moved)
            self.arena.data[start : start + packed.elements].copy_(packed.weights, non_blocking=True)
        self._rewrite({lora_id: self.arena.regions[lora_id][0]})

    def _rewrite(self, starts: dict[int, int]) -> None:
        """Writes the table rows of adapters whose regions now begin at `starts`, where they are active."""
        for lora_id, start in starts.items():
            if lora_id in self.lora_index_to_id:
                slot = self.lora_index_to_id.index(lora_id)
                rows = self.packed[lora_id].table + torch.tensor([start, start, 0])
                if not self.shared:
                    rows = rows.pin_memory()  # else the host would wait for the steps under way
                self.table[:, slot].copy_(rows, non_blocking=True)

    def _deactivate_adapter(self, lora_id: int) -> None:
        if lora_id in self.lora_index_to_id:
            self.table[:, self.lora_index_to_id.index(lora_id)] = 0
        super()._deactivate_adapter(lora_id)
        if not self.shared:
            self.arena.give(lora_id)

    def _unregister(self, lora_id: int) -> None:
        self.deactivate_adapter(lora_id)
        self.arena.give(lora_id)
        self.packed.pop(lora_id, None)

    def remove_adapter(self, adapter_id: int) -> bool:
        self.ledger.forget(adapter_id)
        return super().remove_adapter(adapter_id)

    def remove_all_adapters(self) -> None:
        super().remove_all_adapters()
        self.ledger.sizes.clear()

    def _place_of(self, name: str) -> tuple[int, int] | None:
        """Site and slice of a module named as in the checkpoint; None if this process does not serve it."""
        if not hasattr(self, "places"):
            self.places = {}
            for index, site in enumerate(self.sites):
                parts = self.packed_modules.get(site.name) or [site.name]
                self.places |= {part: (index, i) for i, part in enumerate(parts[: site.slices])}
        return self.places.get(vllm_internals.vllm_name(self.model, name))


class RaggedWorkerManager(LRUCacheWorkerLoRAManager):
    """vLLM's worker manager on the ragged one; times cold loads."""

    _manager_cls = RaggedModelManager

    def add_adapter(self, lora_request: Any) -> bool:
        manager: RaggedModelManager = self._adapter_manager
        known = lora_request.lora_int_id in manager.packed and not lora_request.load_inplace
        if known:
            # vLLM comes here for every adapter of every step, and copies its registry each time.
            manager.get_adapter(lora_request.lora_int_id)
            manager.activate_adapter(lora_request.lora_int_id)
            return True
        start = time.perf_counter()
        added = super().add_adapter(lora_request)
        if lora_request.lora_int_id in manager.packed:
            report.load(manager, lora_request, time.perf_counter() - start)
        return added
