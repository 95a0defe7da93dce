"""What this repository changes inside Lightning 2.6, because no argument of Lightning's does it.

All of it is here, and nowhere else. Each function names the release that it was written for and
says why it is needed. Private attributes may change with any release. pyproject.toml therefore has
an upper bound, and tests/test_lightning_internals.py asserts that every attribute still exists and
still has its effect. Read both before the bound is moved.
"""

import inspect
import signal
from collections.abc import Callable
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.strategies import DDPStrategy


def set_signal_handlers_with(trainer: L.Trainer, listen: Callable[[], None]) -> None:
    """Have `listen()` set the signal handlers at every start of a loop, instead of Lightning.

    Lightning 2.6.6 calls collectives inside its handlers. That deadlocks when one rank is in the
    middle of a backward pass (Lightning-AI/pytorch-lightning issue 20806). It also sets the
    handlers anew whenever a loop starts.
    """
    trainer._signal_connector.register_signal_handlers = listen  # type: ignore[method-assign]


def broadcast_no_signals(trainer: L.Trainer) -> None:
    """Leave out the flag that Lightning 2.6.6 broadcasts in every batch of several ranks.

    The broadcast waits for the GPU, and the flag belongs to the handlers that
    `set_signal_handlers_with` replaces.
    """
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _nothing  # type: ignore[method-assign]


def broadcast_signals(trainer: L.Trainer) -> None:
    """Undo `broadcast_no_signals`, for a benchmark of what it saves."""
    vars(trainer.fit_loop.epoch_loop).pop("_broadcast_sigterm_tensor", None)


def _nothing() -> None:
    """Do nothing, in the place of a method."""


def send_no_buffers(trainer: L.Trainer) -> None:
    """Keep DDP from sending the buffers around in every step: here they are equal on all ranks.

    Lightning 2.6 passes on the keywords of a `DDPStrategy` that a user makes, but takes none for a
    strategy that it chooses by itself. The keyword is `forward_sync_buffers` from torch 2.14 on,
    and `broadcast_buffers` before.
    """
    if not isinstance(trainer.strategy, DDPStrategy):
        return
    keywords = inspect.signature(torch.nn.parallel.DistributedDataParallel).parameters
    name = "broadcast_buffers"
    if "forward_sync_buffers" in keywords:
        name = "forward_sync_buffers"
    trainer.strategy._ddp_kwargs[name] = False


def kill_ranks(trainer: L.Trainer) -> None:
    """End the processes that this one has started as further ranks: they wait for it.

    Does nothing where Slurm or torchrun started the ranks. The launcher of Lightning 2.6 has the
    method, though its documentation does not name it.
    """
    if trainer.strategy.launcher is not None:
        # Windows has no SIGKILL; its SIGTERM kills.
        trainer.strategy.launcher.kill(getattr(signal, "SIGKILL", signal.SIGTERM))


def count_running_epoch(checkpoint: dict[str, Any]) -> None:
    """Count the epoch that is running as begun, in a checkpoint that is about to be saved.

    Lightning 2.6.6 forgets to do so after a resume from the last batch of an epoch. A second resume
    from such a batch would then repeat the epoch's number, and with it the order and the noise.
    """
    for progress in checkpoint["loops"]["fit_loop"]["epoch_progress"].values():
        progress["started"] = progress["processed"] + 1
        progress["ready"] = progress["processed"] + 1
        progress["completed"] = progress["processed"]


def name_no_anonymous_mode(logger: WandbLogger) -> None:
    """Remove the argument `anonymous`, which Lightning 2.6 always passes and wandb warns about."""
    logger._wandb_init.pop("anonymous", None)


# The following attributes are public, and Lightning 2.6 sets them without declaring them.


def callbacks_of(trainer: L.Trainer) -> list[L.Callback]:
    """The callbacks of a trainer, in the order in which they are called."""
    return trainer.callbacks  # type: ignore[attr-defined]


def datamodule_of(trainer: L.Trainer) -> Any:
    """The datamodule that the trainer was handed, of whatever class."""
    return trainer.datamodule  # type: ignore[attr-defined]


def steps_between_logs(trainer: L.Trainer) -> int:
    """trainer.log_every_n_steps."""
    return trainer.log_every_n_steps  # type: ignore[attr-defined]
