"""Run by `test_distributed.py` in one process and under torchrun in two: the gains on the same global batches."""

import sys
from pathlib import Path

import search_models as models
import torch

from lvnas import distributed, files, search
from lvnas.allocate import allocate
from lvnas.errors import InputError
from lvnas.strategies import SearchConfig, make_strategy

SPACE = [0, 1, 2, 4]


class Stream:
    """Global batches of 4; each process takes its part. `poison` is the example that gets NaN pixels."""

    def __init__(self, first, poison=None):
        self.first, self.poison = first, poison

    def __getitem__(self, index):
        batch = models.mllama_batch(self.first + index, size=4)
        ids = list(range(4 * index, 4 * index + 4))
        for row, example in enumerate(ids):
            if example == self.poison:
                batch["pixel_values"][row] = torch.nan
        mine = distributed.share(range(4))
        return {name: value[list(mine)] for name, value in batch.items()}, distributed.share(ids)


def searched(method, seed, state=None, poison=None):
    config = SearchConfig(method=method, ranks=SPACE, steps=6, batch_size=4, learning_rate=1e-2)
    torch.manual_seed(seed)
    strategy = make_strategy(models.mllama(), config)
    losses = search.fit(strategy, Stream(0, poison), Stream(100), state_path=state, save_every=2)
    gains = strategy.gains()
    budget = 2 * gains.parameters()[:, 1].sum()
    return {"losses": losses, "gains": gains.values.tolist(), "ranks": allocate(gains, budget)}


def main(out: Path) -> None:
    torch.set_num_threads(1)
    distributed.join()
    number, count = distributed.place()
    # Another seed in the second process: it must get the first one's start.
    found = {method: searched(method, seed=number) for method in ("score", "darts", "adalora")}
    state = out / f"state-{count}.pt"
    try:
        searched("score", 0, state, poison=14)
    except InputError as error:
        found["message"] = str(error)
    found["resumed"] = searched("score", 0, state)
    if count > 1:
        try:
            searched("eva", 0)
        except InputError as error:
            found["refusal"] = str(error)
    files.write_json(out / f"{count}-{number}.json", found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
