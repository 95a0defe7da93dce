"""The progress of a run in optimizer steps.

Lightning's hooks count batches, and an optimizer step may accumulate several of them.
"""

from typing import cast

import lightning.pytorch as L


def ends_step(trainer: L.Trainer, batch_idx: int) -> bool:
    """Whether an optimizer step ended with this batch.

    Incomplete global batches are dropped, so no epoch ends in the middle of a step.
    """
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


def last_step(trainer: L.Trainer) -> int | None:
    """The last optimizer step of the run; None if neither steps nor epochs are limited.

    It is trainer.max_steps, or the end of trainer.max_epochs if that comes first.
    """
    batches = int((trainer.max_epochs or -1) * trainer.num_training_batches)
    by_epochs = batches // trainer.accumulate_grad_batches
    return min((n for n in (trainer.max_steps, by_epochs) if n > 0), default=None)


def validates_now(trainer: L.Trainer) -> bool:
    """Whether a validation follows the step that has just ended."""
    interval = cast(float, trainer.val_check_batch) // trainer.accumulate_grad_batches
    due = trainer.global_step % interval == 0 or trainer.should_stop
    return due and sum(trainer.num_val_batches) > 0
