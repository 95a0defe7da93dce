"""When checkpoints are saved: periodically, when a validation is the best, and before the end.

What is not finite is never saved.
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
from lightning_modules.lightning_internals import count_running_epoch
from lightning_modules.objective import Objective, as_objective
from lightning_modules.optimizer_steps import ends_step, last_step, validates_now
from lightning_modules.stopping import stop_all_ranks
from results.metrics import Metric

KEPT = 2  # step checkpoints: if the newest does not load, there is another


class Checkpoints(Checkpoint):
    """Saves step-<step>.ckpt every `every_n_steps` and at the last step, and best.ckpt by `metric`.

    The two newest step checkpoints are kept. Where a validation is due at the same step, the
    checkpoint is saved after it, so that a resumed run has that row of the curve and knows that
    score. A state is not saved if its weights are not finite, or its newest step was not. If a
    checkpoint cannot be written, all ranks stop at the same step.

    It is a `Checkpoint` to Lightning, which therefore calls it last.

    folder: of the checkpoints.
    metric: by which weights are the best in validation; None: nothing is validated.
    ValueError, one line: every_n_steps is less than 1.
    """

    def __init__(self, folder: str | Path, every_n_steps: int, metric: Metric | None) -> None:
        check_count("checkpoint.every_n_steps", every_n_steps, least=1)
        self.folder = Path(folder)
        self.every_n_steps = every_n_steps
        self.metric = metric
        self.best: float | None = None  # value of the metric in best.ckpt
        self.waiting = False  # for the validation after this step
        self.saved = -1  # the newest step that was saved

    def state_dict(self) -> dict[str, Any]:
        """The best value of the metric so far."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        count_running_epoch(checkpoint)

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
        self.waiting = due and validates_now(trainer)
        if due and not self.waiting:
            self.save_step(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if self.metric is not None:
            value = trainer.callback_metrics[f"val/{self.metric.name}"]
            self._save_if_better(trainer, self.metric, float(value))
        if self.waiting:
            self.waiting = False
            self.save_step(trainer)

    def _save_if_better(self, trainer: L.Trainer, metric: Metric, value: float) -> None:
        before = self.best
        if not metric.better(value, metric.worst if before is None else before):
            return
        self.best = value  # before it is saved, since the checkpoint holds its own score
        if not self._save(trainer, "best.ckpt"):
            self.best = before

    def save_step(self, trainer: L.Trainer) -> bool:
        """Save the state after this step, and remove all but the two newest step checkpoints.

        False: the state is not finite, and is not saved.
        """
        if self.saved == trainer.global_step:
            return True
        name = f"step-{trainer.global_step:08d}.ckpt"
        if not self._save(trainer, name):
            return False
        self.saved = trainer.global_step
        if trainer.is_global_zero:
            self._remove_older(name)
        return True

    def _remove_older(self, newest: str) -> None:
        """Remove all but the newest step checkpoints, of those up to the file named `newest`.

        A folder or a broken link of such a name is no checkpoint: it neither counts nor is removed.
        """
        paths = (path for path in self.folder.glob("step-*.ckpt") if path.is_file())
        for path in sorted(path for path in paths if path.name <= newest)[:-KEPT]:
            with contextlib.suppress(OSError):  # an older file that stays does no harm
                path.unlink()

    def _save(self, trainer: L.Trainer, name: str) -> bool:
        """Save under a name; False: the state is not finite. RunStopped, one line: it failed."""
        if not finite(as_objective(trainer.lightning_module)):
            rank_zero_info(f"step {trainer.global_step} is not finite: {name} is not written")
            return False
        problem = None
        try:
            trainer.save_checkpoint(self.folder / name)
        except OSError as error:
            trainer.strategy.barrier()  # the other ranks wait at the one that ends save_checkpoint
            problem = str(error)
        stop_all_ranks(trainer, problem)
        return True


def finite(module: Objective) -> bool:
    """Whether weights and statistics are finite, and the newest step was not skipped.

    It waits for the device.
    """
    values = [v for v in module.state_dict().values() if v.is_floating_point() and v.numel()]
    largest = nn.utils.get_total_norm(values, norm_type=math.inf)
    return bool(largest.isfinite()) and not bool(module.skipped_last)
