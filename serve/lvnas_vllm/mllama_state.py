"""Model Runner V2's state for Llama-3.2-Vision. Written against its source; not yet run on a GPU.

That runner hands out LoRA mappings in the scheduler's order but encodes in batch order, so that two images of
different adapters in one step would swap adapters. Here images are encoded in the order of the mappings, and the
model is told which output belongs to which request of the batch.
"""

from typing import Any

from vllm.v1.worker.gpu.model_states.encoder_decoder import EncoderDecoderModelState


class MllamaModelState(EncoderDecoderModelState):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.encoder_order: list[int] = []

    def prepare_inputs_embeds(
        self, scheduled_encoder_inputs: dict[str, list[int]], input_batch: Any, req_states: Any
    ) -> None:
        """Encodes the images that start in this step, in the order in which their adapters were mapped."""
        inputs = {request: items for request, items in scheduled_encoder_inputs.items() if items}
        place = {request: number for number, request in enumerate(inputs)}
        self.encoder_order = [place[request] for request in input_batch.req_ids if request in place]
        _, mm_kwargs = self.encoder_runner.prepare_mm_inputs(inputs)
        self.encoder_outputs = []
        if mm_kwargs:
            with self.encoder_runner.timed_encoder_operation(inputs.keys()):
                self.encoder_outputs = self.encoder_runner.execute_mm_encoder(mm_kwargs)

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        order, self.encoder_order = self.encoder_order, []
        return {**super().prepare_inputs(input_batch, req_states), "encoder_order": order}
