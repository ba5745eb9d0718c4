"""Examples -> batches that `model(**batch)` takes, with labels on the answer only."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

from lvnas.tasks.task import Example

IGNORED = -100


def messages(example: Example, answer: bool = True) -> list[dict[str, Any]]:
    """The example as a chat: one user turn with its images and question, and the answer unless `answer` is False."""
    content: list[dict[str, Any]] = [{"type": "image"} for _ in example.images]
    content.append({"type": "text", "text": example.user})
    chat = [{"role": "user", "content": content}]
    if answer:
        chat.append({"role": "assistant", "content": [{"type": "text", "text": example.assistant}]})
    return chat


class Collator:
    """Turns a list of examples into a batch of B padded sequences of T tokens.

    `labels` [B, T] hold the answer's tokens and its end of turn, IGNORED elsewhere. Examples without images and
    examples with images cannot share a batch (the processor refuses).
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        tokenizer = self.processor.tokenizer
        prompts = [self._render(example, answer=False) for example in examples]
        whole = [self._render(example, answer=True) for example in examples]
        images = [list(example.images) for example in examples] if examples[0].images else None
        batch = self.processor(
            images=images,
            text=whole,
            add_special_tokens=False,
            padding=True,
            padding_side="right",
            return_tensors="pt",
        )
        lengths = [len(ids) for ids in tokenizer(prompts, add_special_tokens=False)["input_ids"]]
        positions = torch.arange(batch["input_ids"].shape[1])
        prompt = positions < torch.tensor(lengths)[:, None]
        labels = batch["input_ids"].masked_fill(prompt | (batch["attention_mask"] == 0), IGNORED)
        return {**batch, "labels": labels}

    def prompts(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """The batch of the prompts alone, padded on the left, for `generate`."""
        images = [list(example.images) for example in examples] if examples[0].images else None
        return dict(
            self.processor(
                images=images,
                text=[self._render(example, answer=False) for example in examples],
                add_special_tokens=False,
                padding=True,
                padding_side="left",
                return_tensors="pt",
            )
        )

    def _render(self, example: Example, answer: bool) -> str:
        return self.processor.apply_chat_template(
            messages(example, answer), add_generation_prompt=not answer, tokenize=False
        )


def make_loader(
    examples: Sequence[Example], processor: Any, batch_size: int, *, shuffle: bool = False, seed: int = 0
) -> DataLoader:
    """A DataLoader of `Collator` batches; with `shuffle`, an order that follows from `seed` alone."""
    generator = torch.Generator().manual_seed(seed)
    data: Any = list(examples)
    return DataLoader(data, batch_size, shuffle=shuffle, collate_fn=Collator(processor), generator=generator)


def endless(loader: DataLoader) -> Iterator[dict[str, torch.Tensor]]:
    """The loader's batches, epoch after epoch."""
    while True:
        yield from loader
