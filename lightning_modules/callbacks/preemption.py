"""Being asked to stop: all ranks save at the same step, then leave."""

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
if hasattr(signal, "SIGUSR1"):  # Windows has none
    MEANING[signal.SIGUSR1] = REQUEUE


class Preemption(Checkpoint):
    """On SIGUSR1 (the end of a job's time), SIGTERM or Ctrl-C saves and leaves with exit code 75.

    The handler only sets a flag. After each optimizer step the ranks exchange their flags, over
    gloo, so that no GPU is waited for. If one of them is set, all ranks save at this step and leave
    before the next one. A validation that is due is finished first, since it decides which weights
    are the best. Outside of training nothing can be lost, and the signal ends the process at once.
    A second Ctrl-C always does.

    `make_trainer` puts the handlers in the place of Lightning's own (lightning_internals.py says
    why).

    SIGUSR1 asks for the job to be queued again. SIGTERM does not, since Slurm sends it to jobs that
    were cancelled; those that were preempted are queued again by reproduce/slurm.sh.

    checkpoints: the callback that saves.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints
        self.process = os.getpid()
        self.received = NOTHING  # by this process
        self.leaving = NOTHING  # what the ranks have agreed on
        self.in_training = False
        self.group: Any = None  # of the ranks, over gloo
        self.message = "stopped"

    def listen(self) -> None:
        """Set the signal handlers of this process."""
        self.process = os.getpid()
        if threading.current_thread() is threading.main_thread():
            for number in MEANING:
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:
            return  # a worker that has just been forked
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        first = not self.received
        self.received = max(self.received, MEANING[signal.Signals(number)])
        if first and self.in_training:
            say(f"{signal.Signals(number).name}: stopping after this step")
        elif first:
            self._leave(agreed=False)

    def _leave(self, agreed: bool = True) -> None:
        requeue = max(self.received, self.leaving) == REQUEUE
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
        """Leave here, after the loggers have had the step that was saved."""
        if self.leaving:
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
        if self.leaving:
            self._leave()

    def _agree(self, trainer: L.Trainer) -> None:
        """Exchange the flags of the ranks, and save where one of them is set."""
        flag = torch.tensor(self.received)
        if self.group is not None:
            distributed.all_reduce(flag, distributed.ReduceOp.MAX, self.group)
        self.leaving = int(flag)
        if not self.leaving:
            return
        outcome = "which is not finite: the newest checkpoint is of an earlier one"
        if self.checkpoints.save_step(trainer):
            outcome = "which is saved"
        self.message = f"stopped at step {trainer.global_step}, {outcome}"


def say(message: str) -> None:
    """Print one line from a signal handler, where `print` may not be entered twice."""
    with contextlib.suppress(OSError):
        os.write(sys.stderr.fileno(), f"{message}\n".encode())
