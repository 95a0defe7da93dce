"""Being asked to stop: all ranks save at the same step, then leave."""

import contextlib
import os
import signal
import sys
import threading

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch import distributed

from lightning_modules.callbacks.checkpoints import Checkpoints
from lightning_modules.steps import ends_step, validates_now
from lightning_modules.stopping import TRY_AGAIN, RunStopped

NOTHING, STOP, REQUEUE = 0, 1, 2
MEANING = {signal.SIGTERM: STOP, signal.SIGINT: STOP, signal.SIGUSR1: REQUEUE}


class Preemption(Checkpoint):
    """On SIGUSR1 (the end of a job's time), SIGTERM or Ctrl-C: save, and leave with exit code 75.

    The handler only sets a flag. After each optimizer step the ranks exchange their flags (over gloo, so that no GPU
    is waited for); when one of them is set all save at this step and leave before the next one. Where a validation is
    due it is finished first, since it decides which weights are the best. Outside of training nothing can be lost,
    and the signal ends the process at once, as a second Ctrl-C always does.

    Lightning 2.6.6 instead calls collectives inside its handlers, which deadlocks when one rank is in the middle of a
    backward pass (issue 20806), and broadcasts a flag from the GPU in every batch, which waits for it. Neither is used.

    SIGUSR1 asks for the job to be queued again. SIGTERM does not, since Slurm sends it to jobs that were cancelled;
    those that were preempted reproduce/slurm.sh queues again.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints
        self.received, self.in_training, self.leaving, self.group = NOTHING, False, NOTHING, None

    def listen(self) -> None:
        """Set the handlers; again before every loop, since Lightning sets its own."""
        if threading.current_thread() is threading.main_thread():
            for number in MEANING:
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        first, self.received = not self.received, max(self.received, MEANING[signal.Signals(number)])
        if not first:
            return
        if self.in_training:
            say(f"{signal.Signals(number).name}: stopping after this step")
        else:
            self.leave("stopped")

    def leave(self, message: str) -> None:
        """RunStopped, to be queued again if that was asked for."""
        raise RunStopped(message, TRY_AGAIN, requeue=max(self.received, self.leaving) == REQUEUE)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.world_size > 1:
            self.group = distributed.new_group(backend="gloo")
            trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.listen()

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.listen()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.in_training = True
        self.listen()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch, batch_idx) -> None:
        if self.leaving:  # here, so that the loggers have had the step that was saved
            self.leave(f"stopped at step {trainer.global_step}, which is saved")

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs, batch, batch_idx) -> None:
        if ends_step(trainer, batch_idx) and not validates_now(trainer):
            self._agree(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.in_training and not trainer.sanity_checking:
            self._agree(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.in_training = False

    def _agree(self, trainer: L.Trainer) -> None:
        flag = torch.tensor(self.received)
        if self.group is not None:
            distributed.all_reduce(flag, distributed.ReduceOp.MAX, self.group)
        self.leaving = int(flag)
        if self.leaving:
            self.checkpoints.save_step(trainer)


def say(message: str) -> None:
    """Print one line from a signal handler, where `print` may not be entered twice."""
    with contextlib.suppress(OSError):
        os.write(sys.stderr.fileno(), f"{message}\n".encode())
