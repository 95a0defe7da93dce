"""Data as pure functions of (seed, epoch, index), so that a killed run goes on with exactly the batches it lacks."""

from collections.abc import Iterator

import lightning.pytorch as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler


class TrainSampler(Sampler):
    """Yields this rank's (epoch, index) pairs in an order that is a function of (seed, epoch).

    The order is cut into global batches of `batch_size` (the incomplete last one is dropped); of each, a rank takes
    its contiguous slice. So one process with 64 and two with 32 see the same images in the same steps.
    """

    def __init__(self, n: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        if batch_size % world_size:
            raise ValueError(
                f"data.batch_size={batch_size} is the global batch: give a multiple of {world_size} processes"
            )
        if not 1 <= batch_size <= n:
            raise ValueError(f"data.batch_size={batch_size} does not fit the {n} training items: give 1 to {n}")
        self.n, self.batch_size, self.seed, self.rank = n, batch_size, seed, rank
        self.local = batch_size // world_size
        self.epoch, self.start_batch = 0, 0

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this before every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.n // self.batch_size * self.local

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.n)
        batches = order[: self.n // self.batch_size * self.batch_size].reshape(-1, self.batch_size)
        mine = batches[self.start_batch :, self.rank * self.local : (self.rank + 1) * self.local]
        return ((self.epoch, int(index)) for index in mine.flat)


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
        start = self.sampler.start_batch
        for number, batch in enumerate(super().__iter__(), start=start + 1):
            self.sampler.start_batch = 0
            self.yielded = number
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"batch": self.yielded % len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.sampler.start_batch = self.yielded = state["batch"]


class ImageArray(Dataset):
    """uint8 images (N, C, H, W); item (epoch, index) is (image, index), flips a function of (seed, epoch, index)."""

    def __init__(self, images: np.ndarray, seed: int = 0, hflip: bool = False) -> None:
        self.images, self.seed, self.hflip = images, seed, hflip
        self._flips = (-1, None)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = key
        image = torch.from_numpy(self.images[index])
        return (image.flip(-1) if self.hflip and self._flip(epoch, index) else image), index

    def _flip(self, epoch: int, index: int) -> bool:
        if self._flips[0] != epoch:
            self._flips = (epoch, np.random.default_rng([self.seed, epoch, 1]).random(len(self)) < 0.5)
        return self._flips[1][index]


class StatelessDataModule(L.LightningDataModule):
    """What every datamodule shares. Subclasses set `shape`, and `train`, `val`, `test` data sets in `setup`.

    Batches are (datum, index). `n_bits` and `dequantizer` are None where data are real numbers (points).
    """

    n_bits: int | None = None
    dequantizer = None
    shape: tuple[int, ...]
    train: Dataset
    val: Dataset
    test: Dataset

    def __init__(self, batch_size: int, num_workers: int, seed: int) -> None:
        super().__init__()
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed

    @property
    def n_train(self) -> int:
        return len(self.train)

    def train_dataloader(self) -> TrainLoader:
        sampler = TrainSampler(len(self.train), self.batch_size, self.seed, *self._rank_and_world())
        return TrainLoader(self.train, sampler.local, sampler=sampler, drop_last=True, **self._workers())

    def val_dataloader(self) -> DataLoader | list:
        return self._eval_loader(self.val) if len(self.val) else []

    def test_dataloader(self) -> DataLoader:
        return self._eval_loader(self.test)

    def train_batches(self, n: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of the first epoch until n items came, the same on every rank (batch-norm re-estimation)."""
        size = min(self.batch_size, len(self.train), n)
        loader = DataLoader(self.train, size, sampler=TrainSampler(len(self.train), size, self.seed))
        return (batch for _, batch in zip(range(-(-n // size)), loader, strict=False))

    def _eval_loader(self, data: Dataset) -> DataLoader:
        rank, world_size = self._rank_and_world()
        local = max(1, self.batch_size // world_size)
        return DataLoader(data, local, sampler=EvalSampler(len(data), rank, world_size), **self._workers())

    def _workers(self) -> dict:
        workers = {"num_workers": self.num_workers, "pin_memory": torch.cuda.is_available()}
        return {**workers, "persistent_workers": True} if self.num_workers else workers

    def _rank_and_world(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)
