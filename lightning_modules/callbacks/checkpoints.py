"""Periodic checkpoints that miss nothing of their step."""

import lightning.pytorch as L
from lightning.pytorch.callbacks import ModelCheckpoint


class StepCheckpoint(ModelCheckpoint):
    """Saves step-<step>.ckpt every `every_n_train_steps`, keeping the newest.

    Where a validation is due at the same step it saves after it, so that a resumed run has that row of the curve and
    knows that score. val_check_interval: steps between validations, or None where there are none.
    """

    def __init__(self, val_check_interval: int | None, **arguments) -> None:
        super().__init__(filename="step-{step:08d}", **arguments)
        self.val_check_interval = val_check_interval
        self.waiting = False

    def on_train_batch_end(self, trainer: L.Trainer, *arguments, **keywords) -> None:
        self.waiting = bool(self.val_check_interval) and trainer.global_step % self.val_check_interval == 0
        if not self.waiting:
            super().on_train_batch_end(trainer, *arguments, **keywords)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.waiting and not trainer.sanity_checking:
            self.waiting = False
            super().on_train_batch_end(trainer, pl_module, None, None, 0)
