"""What every datamodule shares: data are pure functions of (seed, epoch, index)."""

import signal
from collections.abc import Iterator
from itertools import islice

import lightning.pytorch as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from datamodules.samplers import EvalSampler, TrainLoader, TrainSampler, n_micro_batches


def ignore_signals(worker: int) -> None:
    """Signals reach every process of a job or a terminal, but whether to stop is the main process's affair."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):  # Windows has no SIGUSR1
            signal.signal(getattr(signal, name), signal.SIG_IGN)


class StatelessDataModule(L.LightningDataModule):
    """What every datamodule shares. Subclasses set `shape`, and `train`, `val`, `test` data sets in `setup`.

    Batches are (datum, index) or, with classes, (datum, index, label). `n_bits` and `dequantizer` are None where data
    are real numbers (points); `n_classes` and `class_names` are None where data have no classes.
    batch_size: of an optimizer step, over all processes. micro_batch: data that one process holds at once, or None
    for all of its share; an optimizer step then accumulates several.
    """

    n_bits: int | None = None
    dequantizer = None
    n_classes: int | None = None
    class_names: tuple[str, ...] | None = None
    labels = False  # whether batches have them
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

    def train_batches(self, n: int) -> Iterator[list[Tensor]]:
        """This rank's share of the first epoch's batches until n items came (batch-norm re-estimation)."""
        rank, world_size = self._rank_and_world()
        size = min(self.batch_size, len(self.train), n)
        size = max(size - size % world_size, world_size)
        sampler = TrainSampler(len(self.train), size, self.seed, rank, world_size)
        loader = DataLoader(self.train, sampler.local, sampler=sampler)
        return (batch for _, batch in zip(range(-(-n // size)), loader, strict=False))

    def initialization_batch(self, n: int) -> list[Tensor]:
        """The first n training data of epoch 0 (all, where there are fewer), collated; equal on every rank.

        What data-dependent initialisation sees (Kingma & Dhariwal 2018, section 3.1). Not from a loader, which would
        draw from torch's generator.
        """
        sampler = TrainSampler(len(self.train), min(n, len(self.train)), self.seed)
        return default_collate([self.train[key] for key in islice(sampler, sampler.batch_size)])

    def _eval_loader(self, data: Dataset) -> DataLoader:
        rank, world_size = self._rank_and_world()
        if len(data) < world_size:
            raise ValueError(f"{len(data)} items to evaluate on cannot be shared by {world_size} processes: give more")
        share = self.batch_size // world_size
        local = max(1, share if self.micro_batch is None else min(share, self.micro_batch))
        return DataLoader(data, local, sampler=EvalSampler(len(data), rank, world_size), **self._workers())

    def _workers(self) -> dict:
        workers = {"num_workers": self.num_workers, "pin_memory": torch.cuda.is_available()}
        return (
            {**workers, "persistent_workers": True, "worker_init_fn": ignore_signals} if self.num_workers else workers
        )

    def _rank_and_world(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)
