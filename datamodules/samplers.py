"""The order of data as a function of (seed, epoch).

A run that was killed can therefore be resumed with exactly the batches that it has not yet seen.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Sampler

from datamodules.checks import is_whole

Key = tuple[int, int]  # (epoch, index), the key of an item of a data set


def n_micro_batches(batch_size: int, micro_batch: int | None, world_size: int) -> int:
    """The number of batches that a process accumulates in an optimizer step.

    batch_size: the batch size of a step, over all `world_size` processes. micro_batch: the number
    of data that a process handles at once; None: all of its share. Raises ValueError: the
    micro-batches would have different sizes.

    >>> n_micro_batches(batch_size=64, micro_batch=8, world_size=2)
    4
    """
    local = batch_size // world_size
    if micro_batch is None or micro_batch >= local:
        return 1
    if micro_batch < 1 or local % micro_batch:
        raise ValueError(
            f"data.micro_batch={micro_batch} does not divide the {local} items "
            "that a process has in a step"
        )
    return local // micro_batch


def check_batch_size(batch_size: int, n: int) -> None:
    """Refuse a batch size that does not fit n training items. Raises ValueError."""
    if not is_whole(batch_size) or not 1 <= batch_size <= n:
        raise ValueError(
            f"data.batch_size={batch_size} does not fit the {n} training items: give 1 to {n}"
        )


class TrainSampler(Sampler[Key]):
    """Yields the (epoch, index) pairs of this rank, in an order that depends on seed and epoch.

    The order is divided into global batches of `batch_size`; an incomplete last one is dropped.
    Each rank takes its contiguous slice of every batch. So one process with batches of 64 and two
    processes with 32 each, with or without micro-batches, see the same images in the same steps.

    n: the number of training items. Raises ValueError: the batch size does not fit n, or is not a
    multiple of world_size.

    >>> sampler = TrainSampler(n=10, batch_size=4, seed=0)
    >>> len(list(sampler))
    8
    """

    def __init__(
        self, n: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        if batch_size % world_size:
            raise ValueError(
                f"data.batch_size={batch_size} is the global batch: "
                f"give a multiple of the {world_size} processes"
            )
        check_batch_size(batch_size, n)
        self.n = n
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.local = batch_size // world_size
        self.epoch = 0
        self.skip = 0  # number of items of the epoch that a resumed run has already seen

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order is yielded. Lightning calls it before every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.n // self.batch_size * self.local

    def __iter__(self) -> Iterator[Key]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.n)
        batches = order[: self.n // self.batch_size * self.batch_size].reshape(-1, self.batch_size)
        mine = batches[:, self.rank * self.local : (self.rank + 1) * self.local].reshape(-1)
        return ((self.epoch, int(index)) for index in mine[self.skip :])


class EvalSampler(Sampler[Key]):
    """Yields (0, index) for every world_size-th index, beginning at `rank`.

    Ranks may get different numbers of indices: none are repeated to make the numbers equal, so no
    image counts twice.
    """

    def __init__(self, n: int, rank: int = 0, world_size: int = 1) -> None:
        self.indices = range(rank, n, world_size)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[Key]:
        return ((0, index) for index in self.indices)


class TrainLoader(DataLoader):
    """A DataLoader whose state Lightning can save in a checkpoint.

    The state is the number of batches that were yielded in this epoch. It has to be the same on all
    ranks, since Lightning stores only the state of rank 0.
    """

    sampler: TrainSampler
    batch_size: int
    yielded = 0

    # torch declares its own iterator class as the return type.
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        start = self.sampler.skip // self.batch_size
        for number, batch in enumerate(super().__iter__(), start=start + 1):
            self.sampler.skip = 0
            self.yielded = number
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The number of batches that were yielded in this epoch, but 0 at the end of the epoch."""
        return {"batch": self.yielded % len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Skip the batches that were already yielded when the state was saved."""
        self.yielded = state["batch"]
        self.sampler.skip = state["batch"] * self.batch_size
