"""A progress bar with images per second and the time left."""

import time
from datetime import timedelta

import lightning.pytorch as L
from lightning.pytorch.callbacks import TQDMProgressBar

from lightning_modules.optimizer_steps import last_step


class Progress(TQDMProgressBar):
    """Lightning's bar with images/s and the time left until the last step of the run.

    batch_size: the size of a global batch. enabled: whether the bar is drawn; if not, for example
    because the output is no terminal, only the rows of the curve are printed.
    """

    def __init__(self, batch_size: int, enabled: bool) -> None:
        super().__init__(refresh_rate=1 if enabled else 0)
        self.batch_size = batch_size
        self.started = time.monotonic()
        self.first_step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.started = time.monotonic()
        self.first_step = trainer.global_step
        super().on_train_start(trainer, pl_module)

    def get_metrics(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Lightning's metrics, and from the second step on images/s and the time left."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        steps = trainer.global_step - self.first_step
        if not trainer.training or steps <= 0:
            return metrics
        rate = steps / (time.monotonic() - self.started)
        metrics["images/s"] = f"{rate * self.batch_size:.0f}"
        last = last_step(trainer)
        if last is not None:
            metrics["left"] = str(timedelta(seconds=int((last - trainer.global_step) / rate)))
        return metrics
