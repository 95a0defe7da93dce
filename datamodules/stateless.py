"""What every datamodule shares: data are pure functions of (seed, epoch, index)."""

import signal
from collections.abc import Iterator

import lightning.pytorch as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.samplers import EvalSampler, TrainLoader, TrainSampler, n_micro_batches


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


def deaf(worker: int) -> None:
    """Signals reach every process of a job or a terminal, but whether to stop is the main process's affair."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


class StatelessDataModule(L.LightningDataModule):
    """What every datamodule shares. Subclasses set `shape`, and `train`, `val`, `test` data sets in `setup`.

    Batches are (datum, index). `n_bits` and `dequantizer` are None where data are real numbers (points).
    batch_size: of an optimizer step, over all processes. micro_batch: data that one process holds at once, or None
    for all of its share; an optimizer step then accumulates several.
    """

    n_bits: int | None = None
    dequantizer = None
    shape: tuple[int, ...]
    train: Dataset
    val: Dataset
    test: Dataset

    def __init__(self, batch_size: int, micro_batch: int | None, num_workers: int, seed: int) -> None:
        super().__init__()
        self.batch_size, self.micro_batch, self.num_workers, self.seed = batch_size, micro_batch, num_workers, seed

    @property
    def n_train(self) -> int:
        return len(self.train)

    def train_dataloader(self) -> TrainLoader:
        rank, world_size = self._rank_and_world()
        sampler = TrainSampler(len(self.train), self.batch_size, self.seed, rank, world_size)
        size = sampler.local // n_micro_batches(self.batch_size, self.micro_batch, world_size)
        return TrainLoader(self.train, size, sampler=sampler, **self._workers())

    def val_dataloader(self) -> DataLoader | list:
        return self._eval_loader(self.val) if len(self.val) else []

    def test_dataloader(self) -> DataLoader:
        return self._eval_loader(self.test)

    def train_batches(self, n: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's share of the first epoch's batches until n items came (batch-norm re-estimation)."""
        rank, world_size = self._rank_and_world()
        size = min(self.batch_size, len(self.train), n)
        size = max(size - size % world_size, world_size)
        sampler = TrainSampler(len(self.train), size, self.seed, rank, world_size)
        loader = DataLoader(self.train, sampler.local, sampler=sampler)
        return (batch for _, batch in zip(range(-(-n // size)), loader, strict=False))

    def _eval_loader(self, data: Dataset) -> DataLoader:
        rank, world_size = self._rank_and_world()
        if len(data) < world_size:
            raise ValueError(f"{len(data)} items to evaluate on cannot be shared by {world_size} processes: give more")
        share = self.batch_size // world_size
        local = max(1, share if self.micro_batch is None else min(share, self.micro_batch))
        return DataLoader(data, local, sampler=EvalSampler(len(data), rank, world_size), **self._workers())

    def _workers(self) -> dict:
        workers = {"num_workers": self.num_workers, "pin_memory": torch.cuda.is_available()}
        return {**workers, "persistent_workers": True, "worker_init_fn": deaf} if self.num_workers else workers

    def _rank_and_world(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)
