"""The base class of all datamodules, whose data are pure functions of (seed, epoch, index)."""

import os
import signal
from collections.abc import Iterator, Sized
from itertools import islice
from typing import Any, cast

import lightning.pytorch as L
import torch
from torch import Tensor, distributed
from torch.utils.data import DataLoader, Dataset, default_collate

from datamodules.checks import SharedError, check_count
from datamodules.dequantization import Dequantizer
from datamodules.samplers import EvalSampler, TrainLoader, TrainSampler, n_micro_batches

WORKERS_PER_CORE = 32  # more processes than this would only wait for one another


def ignore_signals(worker: int) -> None:
    """Let a worker process ignore signals to stop, since the main process decides when to stop.

    A signal from a scheduler or a terminal is sent to all processes of a run.
    """
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):  # Windows has no SIGUSR1
            signal.signal(getattr(signal, name), signal.SIG_IGN)


class StatelessDataModule(L.LightningDataModule):
    """The base class of all datamodules. Scripts and objectives use nothing else of a datamodule.

    These are known from construction on, so that a script can build the model before data are read:
        shape           the shape of one datum.
        n_bits          for integer data, uint8 from 0 to 2^n_bits - 1; None for real numbers.
        dequantizer     a `Dequantizer` for integer data; None for real numbers.
        labels          whether batches contain class labels.
        n_classes, class_names
                        the number and the names of the classes; None if the data have no classes.
    These are set by `setup`, after `prepare_data` has made sure that the files exist:
        train, val, test
                        data sets, indexed by a key (epoch, index). An item is (datum, index), or
                        with labels (datum, index, label), and a pure function of the seed and the
                        key. `val` and `test` do not depend on the epoch. `val` may be empty.
        content_hash    one sha256 of all data, for a data set of which there is no official
                        version; None for any other.

    Batches are collated items. If a data set has no validation split of its own, the datamodule
    takes an argument `n_val` (data.n_val in a recipe): how many training data are held out for
    validation, 0 for a run without validation. If it has one, no such argument is needed, and
    `trainer.limit_val_batches=0` turns validation off.

    batch_size: the number of data in an optimizer step, over all processes.
    micro_batch: the number of data that one process handles at once; an optimizer step accumulates
        the gradients of several micro-batches. None: all of the process's share at once.
    num_workers: the number of worker processes that load data, for each training process.
    seed: the seed of the order, and of flips, shifts and crops in training.
    Raises ValueError: one of them is out of its range.
    """

    shape: tuple[int, ...]
    n_bits: int | None = None
    dequantizer: Dequantizer | None = None
    n_classes: int | None = None
    class_names: tuple[str, ...] | None = None
    labels: bool = False
    content_hash: str | None = None
    train: Dataset
    val: Dataset
    test: Dataset
    _problem: Exception | None = None

    def __init__(
        self, batch_size: int, micro_batch: int | None, num_workers: int, seed: int
    ) -> None:
        super().__init__()
        check_count("data.batch_size", batch_size, least=1)
        if micro_batch is not None:
            check_count("data.micro_batch", micro_batch, least=1)
        most_workers = WORKERS_PER_CORE * (os.cpu_count() or 1)
        check_count("data.num_workers", num_workers, least=0, most=most_workers)
        check_count("seed", seed, least=0)
        self.batch_size = batch_size
        self.micro_batch = micro_batch
        self.num_workers = num_workers
        self.seed = seed

    def prepare_data(self) -> None:
        """Make sure that the files exist. Lightning calls it in one process of each machine.

        Raises OSError or ValueError, one line: they do not, and cannot be obtained. If there are
        other processes, `setup` raises it in all of them instead: they would wait for this one.
        """
        try:
            self._obtain()
        except (OSError, ValueError) as error:
            if not distributed.is_initialized():
                raise
            self._problem = error

    def _obtain(self) -> None:
        """Obtain the files; data without files have nothing to do here."""

    def _raise_problems(self) -> None:
        """Raise the error that `prepare_data` met in any process, in all of them: SharedError.

        `setup` of a data set with files begins with it.
        """
        if not distributed.is_initialized():
            return
        own = None if self._problem is None else " ".join(str(self._problem).split())
        texts: list[str | None] = [None] * distributed.get_world_size()
        distributed.all_gather_object(texts, own)
        for text in filter(None, texts):
            raise SharedError(text) from self._problem

    def _check_same_content(self) -> None:
        """Raise SharedError in all processes, if one of them has read other data than another.

        `setup` of a data set with a content_hash ends with it.
        """
        if not distributed.is_initialized():
            return
        hashes: list[str | None] = [None] * distributed.get_world_size()
        distributed.all_gather_object(hashes, self.content_hash)
        if len(set(hashes)) > 1:
            raise SharedError(
                "the machines have different images in data.root (sha256 "
                f"{' and '.join(sorted(map(str, set(hashes))))}): give all of them the same files"
            )

    def current_hash(self) -> str | None:
        """The content_hash of the data as they are now. It needs no `setup`, and decodes nothing.

        Raises OSError or ValueError, one line: there are no such data.
        """
        return None

    def unaugmented(self, split: str) -> Dataset:
        """A split after `setup`, "train", "val" or "test", without flips, shifts and random crops.

        A data set that augments its items has a method `unaugmented`, which returns a copy of it.
        """
        data = getattr(self, split)
        if hasattr(data, "unaugmented"):
            return data.unaugmented()
        return data

    @property
    def n_train(self) -> int:
        """The size of the training set, after `setup`."""
        return n_items(self.train)

    def counts(self) -> dict[str, int]:
        """The size of each split, after `setup`."""
        return {split: n_items(getattr(self, split)) for split in ("train", "val", "test")}

    def train_dataloader(self) -> TrainLoader:
        """The batches of this rank, in the order of the sampler's epoch."""
        rank, world_size = self._rank_and_world()
        sampler = TrainSampler(self.n_train, self.batch_size, self.seed, rank, world_size)
        size = sampler.local // n_micro_batches(self.batch_size, self.micro_batch, world_size)
        return TrainLoader(self.train, size, sampler=sampler, **self._workers())

    def val_dataloader(self) -> DataLoader | list:
        """The validation data of this rank; an empty list if there are none."""
        if n_items(self.val) == 0:
            return []
        return self._eval_loader(self.val)

    def test_dataloader(self) -> DataLoader:
        """The test data of this rank."""
        return self._eval_loader(self.test)

    def train_batches(self, n: int) -> Iterator[list[Tensor]]:
        """This rank's share of the first batches of epoch 0, with at least n items over all ranks.

        Batch-norm statistics are estimated on them. There are fewer items if an epoch has fewer.
        """
        rank, world_size = self._rank_and_world()
        size = min(self.batch_size, self.n_train, n)
        size = max(size - size % world_size, world_size)
        sampler = TrainSampler(self.n_train, size, self.seed, rank, world_size)
        loader = DataLoader(self.train, sampler.local, sampler=sampler)
        return islice(loader, -(-n // size))

    def initialization_batch(self, n: int) -> list[Tensor]:
        """The first n training data of epoch 0, or all if there are fewer, as one batch.

        It is the same on every rank. Data-dependent initialisation uses it (Kingma & Dhariwal 2018,
        section 3.1). No DataLoader is used, since one would draw from torch's global generator.
        """
        sampler = TrainSampler(self.n_train, min(n, self.n_train), self.seed)
        return default_collate([self.train[key] for key in islice(sampler, sampler.batch_size)])

    def _eval_loader(self, data: Dataset) -> DataLoader:
        rank, world_size = self._rank_and_world()
        n = n_items(data)
        if n < world_size:
            raise ValueError(
                f"{n} items for evaluation are too few for {world_size} processes: "
                "give more items or fewer processes"
            )
        share = self.batch_size // world_size
        local = max(1, min(share, self.micro_batch or share))
        return DataLoader(data, local, sampler=EvalSampler(n, rank, world_size), **self._workers())

    def _workers(self) -> dict[str, Any]:
        """The arguments of a DataLoader that concern worker processes and pinned memory."""
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
    """The length of a data set; torch's base class declares no `__len__`."""
    return len(cast(Sized, data))
