"""How many images of Llama-3.2-Vision are encoded in one step: as many as the memory was measured for."""

from vllm.config import VllmConfig
from vllm.v1.core.encoder_cache_manager import EncoderDecoderCacheManager
from vllm.v1.request import Request

from lvnas_vllm.mllama_config import image_tokens


class MllamaEncoderBudget(EncoderDecoderCacheManager):
    """Counts every tile of every image against the budget, as the vision model does.

    vLLM's own counts what the cross-attention cache keeps, which is down to one tile of one image, and frees it
    anew at each step, so that its bound wears off.
    """

    def __init__(self, cache_size: int, config: VllmConfig) -> None:
        super().__init__(cache_size)
        hf_config = config.model_config.hf_config
        self.image_tokens = image_tokens(hf_config)
        self.most = hf_config.max_source_positions
        self.held: dict[str, int] = {}
        """Tokens that the vision model makes for each request that starts in this step."""

    @classmethod
    def create_manager(cls, *, cache_size: int, vllm_config: VllmConfig) -> "MllamaEncoderBudget":
        return cls(cache_size, vllm_config)

    def reset(self) -> None:
        super().reset()
        self.held.clear()

    def can_allocate(
        self, request: Request, input_id: int, encoder_compute_budget: int, num_embeds_to_schedule: int
    ) -> bool:
        if request.get_num_encoder_embeds(input_id) > encoder_compute_budget:
            return False
        return sum(self.held.values()) + self._tokens(request, input_id) <= self.cache_size

    def allocate(self, request: Request, input_id: int) -> None:
        self.held[request.request_id] = self._tokens(request, input_id)
        self.allocated.append(request.mm_features[input_id].identifier)

    def free_encoder_input(self, request: Request, input_id: int) -> None:
        self.held.pop(request.request_id, None)

    def _tokens(self, request: Request, input_id: int) -> int:
        """Tokens of all tiles of all images; the most a request may have where its tensors are elsewhere."""
        data = request.mm_features[input_id].data
        if data is None or "aspect_ratio_ids" not in data:
            return self.most
        return data["aspect_ratio_ids"].data.numel() * self.image_tokens
