"""What this house changes inside Lightning 2.6 because there is no argument for it: all of it, and nowhere else.

Each function names the release that it was written for and says why it is needed. Private attributes may go with any
release, so pyproject.toml has an upper bound, and tests/test_lightning_internals.py asserts that every attribute is
still there and still has the effect: read both before the bound is moved.
"""

import inspect
import signal
from collections.abc import Callable

import lightning.pytorch as L
import torch
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.strategies import DDPStrategy


def set_signal_handlers_with(trainer: L.Trainer, listen: Callable[[], None]) -> None:
    """Have `listen()` set the signal handlers at every start of a loop, in the place of Lightning's own.

    Lightning 2.6.6 calls collectives inside its handlers, which deadlocks where one rank is in the middle of a backward
    pass (Lightning-AI/pytorch-lightning issue 20806), and sets them anew whenever a loop starts.
    """
    trainer._signal_connector.register_signal_handlers = listen


def broadcast_no_signals(trainer: L.Trainer) -> None:
    """Leave out the flag that Lightning 2.6.6 broadcasts from the device in every batch of several ranks.

    It waits for the GPU, and the flag is that of the handlers which `set_signal_handlers_with` replaces.
    """
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _nothing


def broadcast_signals(trainer: L.Trainer) -> None:
    """Take back `broadcast_no_signals`, for a benchmark of what it saves."""
    vars(trainer.fit_loop.epoch_loop).pop("_broadcast_sigterm_tensor", None)


def _nothing() -> None:
    """In the place of a method."""


def send_no_buffers(trainer: L.Trainer) -> None:
    """Keep DDP from sending the buffers around in every step: here they are equal on all ranks.

    Lightning 2.6 passes on the keywords of a `DDPStrategy`, but none of a strategy that it chooses by itself. The
    keyword is `forward_sync_buffers` from torch 2.14 on, `broadcast_buffers` before.
    """
    if not isinstance(trainer.strategy, DDPStrategy):
        return
    keywords = inspect.signature(torch.nn.parallel.DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in keywords else "broadcast_buffers"
    trainer.strategy._ddp_kwargs[name] = False


def kill_ranks(trainer: L.Trainer) -> None:
    """End the processes that this one has started as further ranks: they wait for it in a collective.

    Nothing to do where Slurm or torchrun started the ranks. Lightning 2.6's launcher of subprocesses has the method,
    though no document names it.
    """
    if trainer.strategy.launcher is not None:
        # Windows has no SIGKILL; there SIGTERM kills.
        trainer.strategy.launcher.kill(getattr(signal, "SIGKILL", signal.SIGTERM))


def count_running_epoch(checkpoint: dict) -> None:
    """Count the epoch that is running as begun, in a checkpoint that is about to be saved.

    Lightning 2.6.6 forgets to after a resume from the last batch of an epoch; a second resume from such a batch would
    then repeat the epoch's number, and with it the order and the noise.
    """
    for progress in checkpoint["loops"]["fit_loop"]["epoch_progress"].values():
        progress["ready"] = progress["started"] = progress["processed"] + 1
        progress["completed"] = progress["processed"]


def name_no_anonymous_mode(logger: WandbLogger) -> None:
    """Take back the argument `anonymous`, which Lightning 2.6 always hands to wandb, and wandb then warns about."""
    logger._wandb_init.pop("anonymous", None)
