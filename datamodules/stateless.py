"""What every datamodule shares: data are pure functions of (seed, epoch, index)."""

import signal
from collections.abc import Iterator
from itertools import islice

import lightning.pytorch as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from datamodules.dequantization import Dequantizer
from datamodules.samplers import EvalSampler, TrainLoader, TrainSampler, n_micro_batches


def ignore_signals(worker: int) -> None:
    """Signals reach every process of a job or a terminal, but whether to stop is the main process's affair."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):  # Windows has no SIGUSR1
            signal.signal(getattr(signal, name), signal.SIG_IGN)


class StatelessDataModule(L.LightningDataModule):
    """What every datamodule shares, and all that may be used of one.

    Known from construction on, so that a script can build the model before it reads any data:
        shape           of one datum.
        n_bits          of integers, 0 .. 2^n_bits - 1, as uint8; None for real numbers.
        dequantizer     a `Dequantizer` of these integers; None for real numbers.
        labels          whether batches have the number of a class: then n_classes is how many there are.
        n_classes, class_names
                        None where the data have no classes.
    Set by `setup`, after `prepare_data` has made sure that the files are there:
        train, val, test
                        data sets whose item (epoch, index) is (datum, index), with labels (datum, index, label), a pure
                        function of seed, epoch and index; `val` and `test` do not depend on the epoch. `val` may be
                        empty.

    Batches are items, collated. A data set without a validation split of its own takes `n_val` as an argument, so that
    a recipe has the key data.n_val: how many training data are held out, 0 for a run without validation. One with such
    a split needs no such key; `trainer.limit_val_batches=0` then leaves it out.

    batch_size: of an optimizer step, over all processes. micro_batch: data that one process holds at once, or None
    for all of its share; an optimizer step then accumulates several. num_workers: processes that load data. seed: of
    the order, and of flips and crops in training.
    """

    shape: tuple[int, ...]
    n_bits: int | None = None
    dequantizer: Dequantizer | None = None
    n_classes: int | None = None
    class_names: tuple[str, ...] | None = None
    labels = False
    train: Dataset
    val: Dataset
    test: Dataset

    def __init__(
        self, batch_size: int, micro_batch: int | None, num_workers: int, seed: int
    ) -> None:
        super().__init__()
        self.batch_size, self.micro_batch, self.num_workers, self.seed = (
            batch_size,
            micro_batch,
            num_workers,
            seed,
        )

    @property
    def n_train(self) -> int:
        """The size of the training set, after `setup`."""
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
            raise ValueError(
                f"{len(data)} items to evaluate on cannot be shared by {world_size} processes: give more"
            )
        share = self.batch_size // world_size
        local = max(1, share if self.micro_batch is None else min(share, self.micro_batch))
        return DataLoader(
            data, local, sampler=EvalSampler(len(data), rank, world_size), **self._workers()
        )

    def _workers(self) -> dict:
        workers = {"num_workers": self.num_workers, "pin_memory": torch.cuda.is_available()}
        if self.num_workers:
            workers |= {"persistent_workers": True, "worker_init_fn": ignore_signals}
        return workers

    def _rank_and_world(self) -> tuple[int, int]:
        return (
            (self.trainer.global_rank, self.trainer.world_size)
            if self.trainer is not None
            else (0, 1)
        )
