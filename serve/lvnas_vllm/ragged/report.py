"""What the ragged manager says: one block of lines at start, one line and two metrics per cold load."""

from typing import TYPE_CHECKING, Any

from prometheus_client import Gauge, Histogram
from vllm.logger import init_logger

from lvnas_vllm.ragged import native
from lvnas_vllm.vllm_internals.ragged import kv_bytes_per_token

if TYPE_CHECKING:
    from lvnas_vllm.ragged.manager import RaggedModelManager

logger = init_logger("vllm.lvnas.ragged")
LOAD_SECONDS = Histogram(
    "lvnas_adapter_load_seconds",
    "Cold load of an adapter: reading, packing, transfer",
    buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10),
)
ARENA_BYTES = Gauge(
    "lvnas_adapter_bytes", "Bytes that resident adapters own in the arena", multiprocess_mode="livesum"
)


def mib(count: float) -> str:
    """Bytes in MiB, as vLLM's own log lines have them."""
    return f"{count / 2**20:.1f} MiB"


def start(manager: "RaggedModelManager", padded_bytes: int, vllm_config: Any) -> None:
    """Logs the arena's bytes, what vLLM's padded buffers would take, and the difference in KV tokens."""
    arena_bytes = manager.arena.capacity * manager.arena.data.element_size()
    saved, per_token = padded_bytes - arena_bytes, kv_bytes_per_token(vllm_config)
    operators = native.load().reason if manager.shared else "Triton"
    logger.info(
        "Ragged LoRA: %d layers; arena %s for any %d adapters (%s); operators: %s.",
        *(len(manager.covered), mib(arena_bytes), manager.ledger.slots, manager.room.source, operators),
    )
    if manager.room.reserved or not manager.shared:
        gained = f"{saved // per_token} KV-cache tokens gained" if per_token else "no KV cache here"
        logger.info(
            "Ragged LoRA: adapters take %s; padded slots would take %s (%d slots of rank %d): %s.",
            *(
                mib(arena_bytes),
                mib(padded_bytes),
                manager.lora_slots,
                manager.lora_config.max_lora_rank,
                gained,
            ),
        )
    else:
        logger.info(
            "Ragged LoRA: no adapter memory is set aside; adapters take their own bytes as they arrive, "
            "%s at most.",
            mib(arena_bytes),
        )
    stock = sorted({type(m).__name__ for name, m in manager.modules.items() if name not in manager.covered})
    if stock:
        logger.warning("Ragged LoRA: on vLLM's own padded path: %s.", ", ".join(stock))


def load(manager: "RaggedModelManager", request: Any, seconds: float) -> None:
    """Logs and counts one cold load."""
    size = manager.packed[request.lora_int_id].elements * manager.arena.data.element_size()
    used = manager.arena.used * manager.arena.data.element_size()
    LOAD_SECONDS.observe(seconds)
    ARENA_BYTES.set(used)
    logger.info(
        "Ragged LoRA: loaded %s (%s) in %.1f ms; arena %s of %s.",
        *(request.lora_name, mib(size), seconds * 1e3, mib(used)),
        mib(manager.arena.capacity * manager.arena.data.element_size()),
    )
