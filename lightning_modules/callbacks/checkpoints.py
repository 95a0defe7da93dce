"""Saving checkpoints: periodically, after the best validation so far, and at the end of a run.

Weights that are not finite are never saved.
"""

import contextlib
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_modules.checks import check_count
from lightning_modules.lightning_internals import count_running_epoch, leave_last_batch_open
from lightning_modules.objective import Objective, as_objective
from lightning_modules.optimizer_steps import ends_step, last_step, validates_now
from lightning_modules.stopping import stop_all_ranks
from results.metrics import Metric

KEPT = 2  # step checkpoints: if the newest cannot be loaded, there is another one


class Checkpoints(Checkpoint):
    """Saves step-<step>.ckpt every `every_n_steps` and at the last step, and best.ckpt by `metric`.

    The two newest step checkpoints are kept. If a validation takes place at the same step, the
    checkpoint is saved after it, so that it contains that row of the curve and that score. Nothing
    is saved while weights are not finite, or if the newest step was skipped as not finite. If a
    checkpoint cannot be written, all ranks stop at the same step.

    The class is a Lightning `Checkpoint`, so that Lightning calls it after other callbacks.

    folder: the folder of the checkpoints.
    metric: the metric that chooses best.ckpt in validation; None if the run has no validation.
    Raises ValueError: every_n_steps is less than 1.
    """

    def __init__(self, folder: str | Path, every_n_steps: int, metric: Metric | None) -> None:
        check_count("checkpoint.every_n_steps", every_n_steps, least=1)
        self.folder = Path(folder)
        self.every_n_steps = every_n_steps
        self.metric = metric
        self.best: float | None = None  # value of the metric in best.ckpt
        self.saves_after_validation = False  # whether a step checkpoint waits for the validation
        self.saved_step = -1  # the newest step that was saved

    def state_dict(self) -> dict[str, Any]:
        """The best value of the metric so far."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        count_running_epoch(checkpoint)
        leave_last_batch_open(checkpoint)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if not ends_step(trainer, batch_idx):
            return
        step = trainer.global_step
        due = step % self.every_n_steps == 0 or step == last_step(trainer) or trainer.should_stop
        self.saves_after_validation = due and validates_now(trainer)
        if due and not self.saves_after_validation:
            self.save_step(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if self.metric is not None:
            value = trainer.callback_metrics[f"val/{self.metric.name}"]
            self._save_if_better(trainer, self.metric, float(value))
        if self.saves_after_validation:
            self.saves_after_validation = False
            self.save_step(trainer)

    def _save_if_better(self, trainer: L.Trainer, metric: Metric, value: float) -> None:
        before = self.best
        if not metric.better(value, metric.worst if before is None else before):
            return
        self.best = value  # set before saving, since the checkpoint contains its own score
        if not self._save(trainer, "best.ckpt"):
            self.best = before

    def save_step(self, trainer: L.Trainer) -> bool:
        """Save the state after this step, and remove all but the two newest step checkpoints.

        Returns False if the state is not finite and was not saved.
        """
        if self.saved_step == trainer.global_step:
            return True
        name = f"step-{trainer.global_step:08d}.ckpt"
        if not self._save(trainer, name):
            return False
        self.saved_step = trainer.global_step
        if trainer.is_global_zero:
            self._remove_older(name)
        return True

    def _remove_older(self, newest: str) -> None:
        """Remove the older step checkpoints, but keep the KEPT newest of those up to `newest`.

        Folders and broken links with such a name are not checkpoints: they are not counted and not
        removed.

        newest: the name of the file that was just saved.
        """
        paths = (path for path in self.folder.glob("step-*.ckpt") if path.is_file())
        for path in sorted(path for path in paths if path.name <= newest)[:-KEPT]:
            with contextlib.suppress(OSError):  # an older file that stays does no harm
                path.unlink()

    def _save(self, trainer: L.Trainer, name: str) -> bool:
        """Save under a name. Returns False if the state is not finite and was not saved.

        Raises RunStopped: the file could not be written.
        """
        if not finite(as_objective(trainer.lightning_module)):
            rank_zero_info(f"step {trainer.global_step} is not finite: {name} is not written")
            return False
        problem = None
        try:
            trainer.save_checkpoint(self.folder / name)
        except OSError as error:
            trainer.strategy.barrier()  # the other ranks wait at the barrier in save_checkpoint
            problem = str(error)
        stop_all_ranks(trainer, problem)
        return True


def finite(module: Objective) -> bool:
    """Whether weights and statistics are finite, and the newest step was not skipped.

    The host waits for the device.
    """
    values = [v for v in module.state_dict().values() if v.is_floating_point() and v.numel()]
    largest = nn.utils.get_total_norm(values, norm_type=math.inf)
    return bool(largest.isfinite()) and not bool(module.skipped_last)
