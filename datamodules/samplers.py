"""Order as a function of (seed, epoch), so that a killed run goes on with exactly the batches it lacks."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import DataLoader, Sampler


def n_micro_batches(batch_size: int, micro_batch: int | None, world_size: int) -> int:
    """Batches that a process accumulates in an optimizer step. ValueError: they would be uneven."""
    local = batch_size // world_size
    if micro_batch is None or micro_batch >= local:
        return 1
    if micro_batch < 1 or local % micro_batch:
        raise ValueError(
            f"data.micro_batch={micro_batch} does not divide the {local} items that a process has a step"
        )
    return local // micro_batch


class TrainSampler(Sampler):
    """Yields this rank's (epoch, index) pairs in an order that is a function of (seed, epoch).

    The order is cut into global batches of `batch_size` (the incomplete last one is dropped); of each, a rank takes
    its contiguous slice. So one process with 64 and two with 32, whole or in micro-batches, see the same images in the
    same steps.
    """

    def __init__(
        self, n: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        if batch_size % world_size:
            raise ValueError(
                f"data.batch_size={batch_size} is the global batch: give a multiple of {world_size} processes"
            )
        if not 1 <= batch_size <= n:
            raise ValueError(
                f"data.batch_size={batch_size} does not fit the {n} training items: give 1 to {n}"
            )
        self.n, self.batch_size, self.seed, self.rank = n, batch_size, seed, rank
        self.local = batch_size // world_size
        self.epoch, self.skip = 0, 0  # skip: items of the epoch that a resumed run has seen

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this before every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.n // self.batch_size * self.local

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.n)
        batches = order[: self.n // self.batch_size * self.batch_size].reshape(-1, self.batch_size)
        mine = batches[:, self.rank * self.local : (self.rank + 1) * self.local].reshape(-1)
        return ((self.epoch, int(index)) for index in mine[self.skip :])


class EvalSampler(Sampler):
    """Yields (0, index) for every world_size-th index: shards without padding, so that no image counts twice."""

    def __init__(self, n: int, rank: int = 0, world_size: int = 1) -> None:
        self.indices = range(rank, n, world_size)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((0, index) for index in self.indices)


class TrainLoader(DataLoader):
    """A DataLoader that Lightning can checkpoint: its whole state is the number of batches yielded in this epoch.

    Rank-independent on purpose, since Lightning stores rank 0's state for all.
    """

    yielded = 0

    def __iter__(self):
        start = self.sampler.skip // self.batch_size
        for number, batch in enumerate(super().__iter__(), start=start + 1):
            self.sampler.skip = 0
            self.yielded = number
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"batch": self.yielded % len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.yielded, self.sampler.skip = state["batch"], state["batch"] * self.batch_size
