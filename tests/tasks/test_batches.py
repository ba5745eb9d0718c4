import pytest
import torch

from lvnas.bases import load_processor
from lvnas.tasks import load_task
from lvnas.tasks.batches import IGNORED, Collator, make_loader


@pytest.fixture(scope="module")
def processor(raw_tiny):
    return load_processor(str(raw_tiny))


@pytest.mark.parametrize("task", ["locate", "reverse"])
def test_labels_are_the_answer_and_its_end(processor, task):
    examples = load_task(task, {"train": 5, "search": 0, "test": 0}).splits["train"]
    batch = Collator(processor)(examples)
    for ids, labels, example in zip(batch["input_ids"], batch["labels"], examples, strict=True):
        kept = labels != IGNORED
        assert torch.equal(ids[kept], labels[kept])
        assert processor.tokenizer.decode(labels[kept]) == f"{example.assistant}<|eot_id|>"
    assert batch["pixel_values"].shape[2] == 2
    assert (batch["input_ids"] == processor.image_token_id).sum(1).tolist() == [1] * 5


def test_prompts_are_the_start_of_the_whole(processor):
    examples = load_task("codewords", {"train": 4, "search": 0, "test": 0}).splits["train"]
    collate = Collator(processor)
    whole, prompts = collate(examples), collate.prompts(examples)
    for row in range(4):
        prompt = prompts["input_ids"][row][prompts["attention_mask"][row] == 1]
        assert torch.equal(whole["input_ids"][row][: len(prompt)], prompt)
        assert whole["labels"][row][len(prompt) - 1] == IGNORED != whole["labels"][row][len(prompt)]


def test_the_order_follows_from_the_seed(processor):
    examples = load_task("sum", {"train": 16, "search": 0, "test": 0}).splits["train"]

    def order(seed):
        return torch.cat(
            [
                batch["labels"].flatten()
                for batch in make_loader(examples, processor, 4, shuffle=True, seed=seed)
            ]
        )

    assert torch.equal(order(1), order(1))
    assert not torch.equal(order(1), order(2))
