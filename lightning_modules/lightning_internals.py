"""All changes of Lightning 2.6 that need its private attributes, for want of a public argument.

Each function says why it is needed, and for which release it was written. Private attributes may
change with any release. So pyproject.toml has an upper bound for Lightning, and
tests/test_lightning_internals.py asserts that every attribute still exists and has its effect. Read
both before you raise the bound.
"""

import inspect
import signal
from collections.abc import Callable, Iterable
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.strategies import DDPStrategy


def set_signal_handlers_with(trainer: L.Trainer, listen: Callable[[], None]) -> None:
    """Let `listen()` set the signal handlers whenever a loop starts, instead of Lightning.

    Lightning 2.6.6 calls collectives inside its handlers. That deadlocks when one rank is in the
    middle of a backward pass (Lightning-AI/pytorch-lightning issue 20806). It also sets the
    handlers anew whenever a loop starts.
    """
    trainer._signal_connector.register_signal_handlers = listen  # type: ignore[method-assign]


def broadcast_no_signals(trainer: L.Trainer) -> None:
    """Turn off the flag that Lightning 2.6.6 broadcasts between ranks in every batch.

    The broadcast waits for the GPU, and the flag belongs to the handlers that
    `set_signal_handlers_with` replaces.
    """
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _nothing  # type: ignore[method-assign]


def broadcast_signals(trainer: L.Trainer) -> None:
    """Undo `broadcast_no_signals`, for a benchmark of the time that it saves."""
    vars(trainer.fit_loop.epoch_loop).pop("_broadcast_sigterm_tensor", None)


def _nothing() -> None:
    """Do nothing: the replacement of a method that is turned off."""


def send_no_buffers(trainer: L.Trainer) -> None:
    """Stop DDP from broadcasting buffers in every step, since here they are equal on all ranks.

    Lightning 2.6 accepts keyword arguments of DDP only for a `DDPStrategy` that the user makes, not
    for one that it chooses itself. The keyword is `forward_sync_buffers` from torch 2.14 on, and
    `broadcast_buffers` before.
    """
    if not isinstance(trainer.strategy, DDPStrategy):
        return
    keywords = inspect.signature(torch.nn.parallel.DistributedDataParallel).parameters
    name = "broadcast_buffers"
    if "forward_sync_buffers" in keywords:
        name = "forward_sync_buffers"
    trainer.strategy._ddp_kwargs[name] = False


def kill_ranks(trainer: L.Trainer) -> None:
    """Kill the other ranks that this process has started, which would wait for it forever.

    Does nothing if Slurm or torchrun has started the ranks. The method `kill` of the launcher of
    Lightning 2.6 is not documented.
    """
    if trainer.strategy.launcher is not None:
        # Windows has no SIGKILL; SIGTERM kills there.
        trainer.strategy.launcher.kill(getattr(signal, "SIGKILL", signal.SIGTERM))


def count_running_epoch(checkpoint: dict[str, Any]) -> None:
    """Count the current epoch as begun, in a checkpoint that is about to be saved.

    Lightning 2.6.6 does not do so after a resume from the last batch of an epoch. A second resume
    from such a batch would then repeat the epoch's number, and with it the order and the noise.
    """
    for progress in checkpoint["loops"]["fit_loop"]["epoch_progress"].values():
        progress["started"] = progress["processed"] + 1
        progress["ready"] = progress["processed"] + 1
        progress["completed"] = progress["processed"]


def leave_last_batch_open(checkpoint: dict[str, Any]) -> None:
    """Store the last batch of an epoch as not completed, as before the validation that follows it.

    Lightning 2.6.6 ends the epoch at a resume from a checkpoint that was saved after a validation
    there only if the resumed run validates at this step, too. With another
    trainer.val_check_interval it would train on a batch beyond the end of the epoch.
    """
    batches = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    if batches["is_last_batch"]:
        for progress in (batches["total"], batches["current"]):
            progress["completed"] = progress["processed"] - 1


def name_no_anonymous_mode(logger: WandbLogger) -> None:
    """Remove the argument `anonymous` that Lightning 2.6 always passes; wandb warns about it."""
    logger._wandb_init.pop("anonymous", None)


def forget_metrics(trainer: L.Trainer, keys: Iterable[str]) -> None:
    """Remove values from `trainer.callback_metrics`.

    Lightning 2.6 keeps there what an earlier validation has logged, beside the values of the newest
    one. A metric that is not measured at every validation would look measured again. That the
    attribute is the dict itself, not a copy, is not documented.
    """
    for key in keys:
        trainer.callback_metrics.pop(key, None)


# The following attributes are public, but Lightning 2.6 does not declare them for type checkers.


def callbacks_of(trainer: L.Trainer) -> list[L.Callback]:
    """The callbacks of a trainer, in the order in which they are called."""
    return trainer.callbacks  # type: ignore[attr-defined]


def datamodule_of(trainer: L.Trainer) -> Any:
    """The datamodule that was passed to the trainer, of any class."""
    return trainer.datamodule  # type: ignore[attr-defined]


def steps_between_logs(trainer: L.Trainer) -> int:
    """trainer.log_every_n_steps."""
    return trainer.log_every_n_steps  # type: ignore[attr-defined]
