"""The speed of training, for the logger."""

import time
from typing import Any

import lightning.pytorch as L

from lightning_modules.lightning_internals import steps_between_logs
from lightning_modules.optimizer_steps import ends_step


class Throughput(L.Callback):
    """Logs `trainer/images_per_second` of training, over all ranks, in each row of training.

    It is the mean since the row before, or since training began or went on. The time of validations
    and of the pictures that are drawn after them does not count.

    batch_size: the size of a global batch.
    """

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.since = 0.0  # when the steps that are counted began, moved by pauses; seconds
        self.first_step = 0  # the step before them
        self.paused_at: float | None = None  # when a validation began, until the next batch

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.since = time.monotonic()
        self.first_step = trainer.global_step
        self.paused_at = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.paused_at is not None:
            self.since += time.monotonic() - self.paused_at
            self.paused_at = None

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.paused_at is None:
            self.paused_at = time.monotonic()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        is_logged = trainer.global_step % steps_between_logs(trainer) == 0
        steps = trainer.global_step - self.first_step
        if not is_logged or not ends_step(trainer, batch_idx) or steps == 0:
            return
        now = time.monotonic()
        rate = steps * self.batch_size / (now - self.since)
        pl_module.log("trainer/images_per_second", rate)
        self.since = now
        self.first_step = trainer.global_step
