"""The adapter arena: one buffer of fixed address and size in which every resident adapter owns a region.

An adapter's region holds the rows of all its modules at their own ranks, so a load is one contiguous
transfer, the arena's bytes are the adapters' bytes, and a rank of 0 costs nothing.
"""

import bisect
from dataclasses import dataclass, field

import torch

ALIGN = 32
"""Every matrix starts at a multiple of this many elements (64 bytes in 16-bit types: a cache line)."""
MOVE = 1 << 22
"""Elements moved at a time by a compaction."""


def aligned(elements: int) -> int:
    """`elements` rounded up to the arena's alignment."""
    return -(-elements // ALIGN) * ALIGN


class ArenaFull(RuntimeError):
    """More elements were asked for than are free; the ledger makes this unreachable in an engine."""


@dataclass
class Arena:
    """Regions of one flat buffer: first fit; compaction when only the sum of the holes is large enough."""

    data: torch.Tensor
    """The buffer, 1-D; never reallocated (CUDA graphs and the kernels' tables keep its address)."""
    regions: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Adapter id -> (start, size), in elements."""

    @classmethod
    def allocate(cls, elements: int, dtype: torch.dtype, device: torch.device | str, commit: bool) -> "Arena":
        """An empty arena; on CPU its pages are only promised by the system until first used, unless `commit`.

        A tail of one alignment unit keeps the last region's vector reads inside the buffer.
        """
        data = torch.empty(aligned(elements) + ALIGN, dtype=dtype, device=device)
        return cls(data.zero_() if commit else data)

    @property
    def capacity(self) -> int:
        """Elements that adapters can own."""
        return self.data.numel() - ALIGN

    @property
    def used(self) -> int:
        """Elements that adapters own now."""
        return sum(size for _, size in self.regions.values())

    @property
    def free(self) -> int:
        return self.capacity - self.used

    def take(self, adapter: int, elements: int) -> tuple[int, dict[int, int]]:
        """Gives `adapter` a region of `elements` (rounded up to the alignment).

        Returns its start, and the new start of every adapter that a compaction moved to make room.

        Raises:
            ArenaFull: fewer than `elements` are free in all.
        """
        assert adapter not in self.regions, f"adapter {adapter} is already resident"
        size = aligned(elements)
        if size > self.free:
            raise ArenaFull(
                f"adapter {adapter} needs {size} elements; {self.free} of {self.capacity} are free"
            )
        start, moved = self._hole(size), {}
        if start is None:
            moved = self.compact()
            start = self.used
        self.regions[adapter] = (start, size)
        return start, moved

    def give(self, adapter: int) -> None:
        """Frees the region of `adapter`; freeing one that is not resident does nothing."""
        self.regions.pop(adapter, None)

    def region(self, adapter: int) -> torch.Tensor:
        """The elements that `adapter` owns, as a view."""
        start, size = self.regions[adapter]
        return self.data[start : start + size]

    def compact(self) -> dict[int, int]:
        """Moves regions down until all free elements are at the end; returns the new starts of the moved."""
        moved, end = {}, 0
        for adapter, (start, size) in sorted(self.regions.items(), key=lambda item: item[1][0]):
            if start != end:
                self._move(end, start, size)
                self.regions[adapter] = (end, size)
                moved[adapter] = end
            end += size
        return moved

    def _hole(self, size: int) -> int | None:
        """The lowest start of a hole of `size` elements."""
        end = 0
        for start, length in sorted(self.regions.values()):
            if start - end >= size:
                return end
            end = max(end, start + length)
        return end if self.capacity - end >= size else None

    def _move(self, target: int, source: int, size: int) -> None:
        """Copies down in ascending chunks through a buffer: source and target may overlap."""
        for low in range(0, size, MOVE):
            high = min(low + MOVE, size)
            self.data[target + low : target + high] = self.data[source + low : source + high].clone()


@dataclass
class Ledger:
    """Which adapters may be resident: any `slots` of the admitted ones must fit in the arena together.

    The scheduler counts adapters, not bytes, and brings an adapter in inside a running step. So the rule
    holds for every adapter ever admitted and not removed, evicted ones included, and is checked at a load.
    """

    capacity: int
    """Elements of the arena."""
    slots: int
    """How many adapters can be resident at once."""
    sizes: dict[int, int] = field(default_factory=dict)
    """Admitted adapter id -> elements."""

    def worst(self, without: int | None = None) -> list[int]:
        """The sizes of the largest `slots` admitted adapters, ascending."""
        sizes = sorted(size for adapter, size in self.sizes.items() if adapter != without)
        return sizes[-self.slots :]

    def admit(self, adapter: int, elements: int, element_bytes: int) -> None:
        """Admits `adapter` (again, with a new size, if it is known).

        Raises:
            ValueError: the largest `slots` adapters would not fit; names needed, free and capacity in bytes.
        """
        size = aligned(elements)
        others = self.worst(without=adapter)
        total = others.copy()
        bisect.insort(total, size)
        total = total[-self.slots :]
        if sum(total) > self.capacity:
            # What is left beside the adapters that can be resident together with this one.
            free = self.capacity - sum(others[-(self.slots - 1) :] if self.slots > 1 else [])
            raise ValueError(
                f"adapter refused: it needs {size * element_bytes} bytes at its own ranks, "
                f"{max(free, 0) * element_bytes} are free of a capacity of {self.capacity * element_bytes} "
                f"({self.slots} adapters resident at once, {len(self.sizes)} loaded); raise --adapter-memory "
                f"(LVNAS_ADAPTER_MEMORY), lower --max-loras, or unload an adapter"
            )
        self.sizes[adapter] = size

    def forget(self, adapter: int) -> None:
        """Takes `adapter` off the list: its next load is checked anew."""
        self.sizes.pop(adapter, None)
