"""Signals that ask a run to stop: all ranks save at the same step, and then exit."""

import contextlib
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch import distributed

from lightning_modules.callbacks.checkpoints import Checkpoints
from lightning_modules.lightning_internals import broadcast_no_signals
from lightning_modules.optimizer_steps import ends_step, validates_now
from lightning_modules.stopping import TRY_AGAIN, RunStopped

NOTHING = 0
STOP = 1
REQUEUE = 2
MEANING = {signal.SIGTERM: STOP, signal.SIGINT: STOP}
if hasattr(signal, "SIGUSR1"):  # Windows has no SIGUSR1
    MEANING[signal.SIGUSR1] = REQUEUE


class Preemption(Checkpoint):
    """Saves and exits with code 75 on SIGUSR1 (a job's time is almost over), SIGTERM and Ctrl-C.

    The signal handler only sets a flag. After each optimizer step the ranks exchange their flags
    over gloo, on the CPU, so that no rank waits for its GPU. If one of them is set, all ranks save
    at this step and exit before the next one. A validation at that step is finished first, since it
    decides which weights are the best. Outside of training there is nothing to save, and the signal
    ends the process at once. A second Ctrl-C always does.

    `make_trainer` replaces Lightning's own handlers by these (lightning_internals.py says why).

    SIGUSR1 also asks the scheduler to queue the job again. SIGTERM does not, since Slurm sends it
    to cancelled jobs too; reproduce/slurm.sh queues preempted jobs again.

    checkpoints: the callback that saves.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints
        self.process = os.getpid()
        self.received = NOTHING  # the flag of this process
        self.agreed_flag = NOTHING  # the largest flag of all ranks, after an exchange
        self.in_training = False
        self.group: Any = None  # the process group of all ranks, over gloo
        self.message = "stopped"

    def listen(self) -> None:
        """Set the signal handlers of this process."""
        self.process = os.getpid()
        if threading.current_thread() is threading.main_thread():
            for number in MEANING:
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:
            return  # a worker process that was just forked still has this handler
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        first = not self.received
        self.received = max(self.received, MEANING[signal.Signals(number)])
        if first and self.in_training:
            say(f"{signal.Signals(number).name}: stopping after this step")
        elif first:
            self._leave(agreed=False)

    def _leave(self, agreed: bool = True) -> None:
        requeue = max(self.received, self.agreed_flag) == REQUEUE
        raise RunStopped(self.message, TRY_AGAIN, requeue=requeue, agreed=agreed)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.world_size > 1:
            self.group = distributed.new_group(backend="gloo")
            broadcast_no_signals(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.in_training = True

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Exit here, after the loggers have logged the step that was saved."""
        if self.agreed_flag:
            self._leave()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if ends_step(trainer, batch_idx) and not validates_now(trainer):
            self._agree(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.in_training and not trainer.sanity_checking:
            self._agree(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._agree(trainer)
        self.in_training = False
        if self.agreed_flag:
            self._leave()

    def _agree(self, trainer: L.Trainer) -> None:
        """Exchange the flags of the ranks, and save if one of them is set."""
        flag = torch.tensor(self.received)
        if self.group is not None:
            distributed.all_reduce(flag, distributed.ReduceOp.MAX, self.group)
        self.agreed_flag = int(flag)
        if not self.agreed_flag:
            return
        outcome = "which is not finite: the newest checkpoint is of an earlier step"
        if self.checkpoints.save_step(trainer):
            outcome = "which is saved"
        self.message = f"stopped at step {trainer.global_step}, {outcome}"


def say(message: str) -> None:
    """Print one line from a signal handler, which may have interrupted a `print`."""
    with contextlib.suppress(OSError):
        os.write(sys.stderr.fileno(), f"{message}\n".encode())
