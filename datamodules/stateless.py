"""What every datamodule shares: data are pure functions of (seed, epoch, index)."""

import os
import signal
from collections.abc import Iterator, Sized
from itertools import islice
from typing import Any, cast

import lightning.pytorch as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from datamodules.checks import check_count
from datamodules.dequantization import Dequantizer
from datamodules.samplers import EvalSampler, TrainLoader, TrainSampler, n_micro_batches

WORKERS_A_CORE = 32  # more processes than this would only wait for one another


def ignore_signals(worker: int) -> None:
    """Let the worker process ignore signals: whether to stop is decided by the main process.

    A signal of a job or a terminal reaches every process of the run.
    """
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):  # Windows has no SIGUSR1
            signal.signal(getattr(signal, name), signal.SIG_IGN)


class StatelessDataModule(L.LightningDataModule):
    """The base class of every datamodule, and all that a script or an objective may use of one.

    Known from construction on, so that a script can build the model before it reads any data:
        shape           of one datum.
        n_bits          of integers, 0 .. 2^n_bits - 1, as uint8; None for real numbers.
        dequantizer     a `Dequantizer` of these integers; None for real numbers.
        labels          whether batches hold the number of a class; then n_classes counts them.
        n_classes, class_names
                        None where the data have no classes.
    Set by `setup`, after `prepare_data` has made sure that the files are there:
        train, val, test
                        data sets whose item (epoch, index) is (datum, index), with labels
                        (datum, index, label), a pure function of seed, epoch and index; `val` and
                        `test` do not depend on the epoch. `val` may be empty.

    Batches are collated items. A data set without a validation split of its own takes `n_val` as an
    argument, so that a recipe has the key data.n_val: how many training data are held out, 0 for a
    run without validation. A data set with such a split needs no such key;
    `trainer.limit_val_batches=0` then leaves it out.

    batch_size: of an optimizer step, over all processes.
    micro_batch: data that one process holds at once; None: all of its share. An optimizer step then
        accumulates several micro-batches.
    num_workers: processes that load data.
    seed: of the order, and of flips and crops in training.
    ValueError, one line: one of them is out of its range.
    """

    shape: tuple[int, ...]
    n_bits: int | None = None
    dequantizer: Dequantizer | None = None
    n_classes: int | None = None
    class_names: tuple[str, ...] | None = None
    labels: bool = False
    train: Dataset
    val: Dataset
    test: Dataset

    def __init__(
        self, batch_size: int, micro_batch: int | None, num_workers: int, seed: int
    ) -> None:
        super().__init__()
        check_count("data.batch_size", batch_size, least=1)
        if micro_batch is not None:
            check_count("data.micro_batch", micro_batch, least=1)
        most_workers = WORKERS_A_CORE * (os.cpu_count() or 1)
        check_count("data.num_workers", num_workers, least=0, most=most_workers)
        check_count("seed", seed, least=0)
        self.batch_size = batch_size
        self.micro_batch = micro_batch
        self.num_workers = num_workers
        self.seed = seed

    @property
    def n_train(self) -> int:
        """The size of the training set, after `setup`."""
        return n_items(self.train)

    def train_dataloader(self) -> TrainLoader:
        """The batches of this rank, in the order of the sampler's epoch."""
        rank, world_size = self._rank_and_world()
        sampler = TrainSampler(self.n_train, self.batch_size, self.seed, rank, world_size)
        size = sampler.local // n_micro_batches(self.batch_size, self.micro_batch, world_size)
        return TrainLoader(self.train, size, sampler=sampler, **self._workers())

    def val_dataloader(self) -> DataLoader | list:
        """The validation data of this rank; an empty list where there is no validation."""
        if n_items(self.val) == 0:
            return []
        return self._eval_loader(self.val)

    def test_dataloader(self) -> DataLoader:
        """The test data of this rank."""
        return self._eval_loader(self.test)

    def train_batches(self, n: int) -> Iterator[list[Tensor]]:
        """This rank's share of the first epoch's batches, until n items came over all ranks.

        Batch-norm statistics are estimated on them.
        """
        rank, world_size = self._rank_and_world()
        size = min(self.batch_size, self.n_train, n)
        size = max(size - size % world_size, world_size)
        sampler = TrainSampler(self.n_train, size, self.seed, rank, world_size)
        loader = DataLoader(self.train, sampler.local, sampler=sampler)
        return islice(loader, -(-n // size))

    def initialization_batch(self, n: int) -> list[Tensor]:
        """The first n training data of epoch 0, or all where there are fewer, as one batch.

        It is equal on every rank. Data-dependent initialisation sees it (Kingma & Dhariwal 2018,
        section 3.1). It does not come from a loader, which would draw from torch's generator.
        """
        sampler = TrainSampler(self.n_train, min(n, self.n_train), self.seed)
        return default_collate([self.train[key] for key in islice(sampler, sampler.batch_size)])

    def _eval_loader(self, data: Dataset) -> DataLoader:
        rank, world_size = self._rank_and_world()
        n = n_items(data)
        if n < world_size:
            raise ValueError(
                f"{n} items to evaluate on cannot be shared by {world_size} processes: give more"
            )
        share = self.batch_size // world_size
        local = max(1, min(share, self.micro_batch or share))
        return DataLoader(data, local, sampler=EvalSampler(n, rank, world_size), **self._workers())

    def _workers(self) -> dict[str, Any]:
        """The arguments of a loader that are about its worker processes."""
        workers: dict[str, Any] = {
            "num_workers": self.num_workers,
            "pin_memory": torch.cuda.is_available(),
        }
        if self.num_workers:
            workers |= {"persistent_workers": True, "worker_init_fn": ignore_signals}
        return workers

    def _rank_and_world(self) -> tuple[int, int]:
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size


def n_items(data: Dataset) -> int:
    """The length of a data set: torch's base class does not declare one."""
    return len(cast(Sized, data))
