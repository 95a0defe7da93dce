"""Check, before a run starts, everything that it will need up to its end.

A mistake that shows only at the end would cost the whole run.
"""

import math
import os
import shutil
from collections.abc import Sized
from pathlib import Path
from typing import Protocol, cast, runtime_checkable

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader

from datamodules.stateless import StatelessDataModule
from lightning_modules.objective import Objective
from reproduce.config import ConfigError
from reproduce.kinds import argument_text
from reproduce.launch import check_processes, processes

MPS_LACKS = "a Mac's GPU (MPS) lacks the float64 in which flows make their matrices"
GPUS_ALONE = (
    "means GPUs, and this run is on the CPU: give the number of processes, as trainer.devices=1"
)
MOMENTS = 2  # numbers that Adam, Adamax and AdamW keep for each parameter


@runtime_checkable
class PreparesTest(Protocol):
    """A callback or an objective that needs something for the test, such as a metric's weights."""

    def prepare_test(self) -> None:
        """Get what the test needs, on every rank, before the first step.

        ValueError, OSError: it is not available.
        """


def check_settings(config: DictConfig) -> None:
    """ConfigError, one line: settings exclude one another, or this machine cannot run them.

    Single values are checked by `reproduce.schema` and by the constructors.
    """
    _check_device(config)
    _check_processes(config)
    trainer = config.trainer
    for key in ("max_steps", "max_epochs"):
        if trainer[key] == 0:
            raise ConfigError(
                f"trainer.{key}=0 trains nothing: give at least 1, or -1 for no limit"
            )
    if config.checkpoint.select == "best" and not validates(config):
        keys = ("data.n_val", "trainer.limit_val_batches")
        settings = " ".join(f"{key}=0" for key in keys if OmegaConf.select(config, key) == 0)
        raise ConfigError(
            f"{settings} leaves nothing to choose the best weights by: add checkpoint.select=last"
        )
    if trainer.limit_test_batches == 0:
        raise ConfigError(
            "trainer.limit_test_batches=0 tests nothing: give at least 1, or null for all"
        )


def validates(config: DictConfig) -> bool:
    """Whether a run has a validation.

    A data set that comes with a validation split has no key data.n_val.
    """
    return config.data.get("n_val") != 0 and config.trainer.limit_val_batches != 0


def _on_cpu(config: DictConfig) -> bool:
    return config.trainer.accelerator == "cpu" or not torch.cuda.is_available()


def _check_device(config: DictConfig) -> None:
    accelerator = config.trainer.accelerator
    if accelerator == "mps":
        raise ConfigError(f"trainer.accelerator=mps, but {MPS_LACKS}: give cpu")
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise ConfigError(
            f"trainer.accelerator={accelerator}, but there is no GPU here: give preset=cpu"
        )
    devices = config.trainer.devices
    if devices != "auto" and not isinstance(devices, int) and _on_cpu(config):
        raise ConfigError(f"trainer.devices={argument_text(devices)} {GPUS_ALONE}")
    if config.trainer.cuda_graph and _on_cpu(config):
        raise ConfigError("trainer.cuda_graph=true needs a GPU: give false")
    if config.trainer.precision == "16-mixed" and _on_cpu(config):  # Lightning would take bf16
        raise ConfigError("trainer.precision=16-mixed needs a GPU: give bf16-mixed or 32-true")


def _check_processes(config: DictConfig) -> None:
    """ConfigError: the settings need processes that nobody starts, or devices that are missing.

    Without the check the processes that do run would wait for the missing ones for ever.
    """
    if processes():  # srun or torchrun has started them
        check_processes(config.trainer)
        return
    if {"MASTER_ADDR", "NODE_RANK"} <= os.environ.keys():
        return  # the user has started them
    if config.trainer.num_nodes > 1:
        raise ConfigError(
            f"trainer.num_nodes={config.trainer.num_nodes}, but nobody starts the other nodes: "
            "use sbatch reproduce/slurm.sh or torchrun, or give trainer.num_nodes=1"
        )
    devices = config.trainer.devices
    if devices == "auto":
        return
    if _on_cpu(config):
        if devices < 1:
            raise ConfigError(f"trainer.devices={devices} {GPUS_ALONE}")
        n = max(os.cpu_count() or 1, 2)  # two processes can share a core
        what = "CPU cores"
    else:
        n = torch.cuda.device_count()
        what = "GPUs"
    if isinstance(devices, int):
        if devices > n:
            raise ConfigError(
                f"trainer.devices={devices}, but there are {n} {what} here: give at most {n}"
            )
    elif max(devices) >= n:
        raise ConfigError(
            f"trainer.devices={argument_text(devices)}, but there are {n} {what} here: "
            f"give numbers from 0 to {n - 1}"
        )


@rank_zero_only
def check_folder(config: DictConfig, module: Objective) -> None:
    """ConfigError: the run folder cannot be written, or its disk has no room for a checkpoint.

    Rank 0 alone writes there. A file system that tells no size, as some network folders, has room.
    """
    folder = Path(config.run_dir)
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    for path in (existing, folder / "checkpoints", folder / "samples"):
        if path.exists() and not (path.is_dir() and os.access(path, os.W_OK | os.X_OK)):
            raise ConfigError(f"{path} is no folder that this user can write: give another run_dir")
    needed = checkpoint_bytes(config, module)
    usage = shutil.disk_usage(existing)
    if usage.total and usage.free < needed:
        raise ConfigError(
            f"{existing} has {_size(usage.free)} left, and a checkpoint of this run takes about "
            f"{_size(needed)}: make room, or give another run_dir"
        )


def checkpoint_bytes(config: DictConfig, module: Objective) -> int:
    """The size of a checkpoint: weights, buffers, the optimizer's moments and averaged weights."""
    weights = sum(value.nbytes for value in module.state_dict().values())
    trained = sum(parameter.nbytes for parameter in module.trained.parameters())
    averages = 0 if config.ema.decay is None else weights
    return weights + MOMENTS * trained + averages


def _size(n_bytes: int) -> str:
    if n_bytes < 10**9:
        return f"{n_bytes / 10**6:,.1f} MB"
    return f"{n_bytes / 10**9:,.1f} GB"


class Readiness(L.Callback):
    """Checks before the first step that there are data to validate and to test on.

    It also calls `prepare_test` of callbacks and objectives that need something for the test
    (`PreparesTest`).
    """

    def __init__(self, config: DictConfig) -> None:
        self.config = config

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        data: StatelessDataModule = vars(trainer)["datamodule"]
        if not len(cast("Sized", data.test)):
            raise ConfigError(
                f"{self.config.data.name} has no test data, on which a run is tested at its end: "
                "give data.n_test of at least 1"
            )
        n_ranks = trainer.world_size
        self._check_share("limit_test_batches", fewest_batches(data.test_dataloader(), n_ranks))
        if validates(self.config):
            self._check_share("limit_val_batches", fewest_batches(data.val_dataloader(), n_ranks))
        callbacks: list[L.Callback] = vars(trainer)["callbacks"]
        for part in (pl_module, *callbacks):
            if isinstance(part, PreparesTest):
                part.prepare_test()

    def _check_share(self, key: str, n_batches: int) -> None:
        """ConfigError: a setting asks for a share of the batches that is less than one batch."""
        share = self.config.trainer[key]
        if isinstance(share, float) and n_batches and int(share * n_batches) == 0:
            raise ConfigError(
                f"trainer.{key}={share:g} is less than one batch (batches: {n_batches}): give at "
                f"least {share_of_one(n_batches)}, a number of batches as an int, or null for all"
            )


def fewest_batches(loader: DataLoader | list, n_ranks: int) -> int:
    """The number of batches of the rank that has the fewest, so that all ranks decide alike.

    Ranks share the data without padding. One that ended alone would leave the others waiting.
    """
    if not isinstance(loader, DataLoader):
        return 0
    return math.ceil(len(cast("Sized", loader.dataset)) // n_ranks / (loader.batch_size or 1))


def share_of_one(n: int) -> float:
    """The least share of n with few decimals that is at least one of them.

    >>> share_of_one(1), share_of_one(3), share_of_one(16)
    (1.0, 0.4, 0.07)
    """
    scale = 10 ** len(str(n))
    return math.ceil(scale / n) / scale
