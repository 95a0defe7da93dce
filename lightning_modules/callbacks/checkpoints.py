"""When to save: periodically, when better, before the end; never what is not finite."""

import math
from pathlib import Path

import lightning.pytorch as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_modules.lightning_internals import count_running_epoch
from lightning_modules.objective import Objective
from lightning_modules.optimizer_steps import ends_step, last_step, validates_now
from lightning_modules.stopping import RunStopped
from results.metrics import Metric

KEPT = 2  # step checkpoints: should the newest not load, there is another


class Checkpoints(Checkpoint):
    """step-<step>.ckpt every `every_n_steps` and at the last step, the newest two kept; best.ckpt by `metric`.

    Where a validation is due at the same step it saves after it, so that a resumed run has that row of the curve and
    knows that score. A state whose weights, or whose newest step, are not finite is not saved. Where a checkpoint
    cannot be written, all ranks stop at the same step.

    metric: the one by which, in validation, weights are the best; None: nothing is validated. A `Checkpoint` to
    Lightning, which therefore calls it last.
    """

    def __init__(self, folder: Path, every_n_steps: int, metric: Metric | None) -> None:
        if every_n_steps < 1:
            raise ValueError(f"checkpoint.every_n_steps={every_n_steps} are steps: give at least 1")
        self.folder, self.every_n_steps, self.metric = Path(folder), every_n_steps, metric
        self.best: float | None = None
        self.waiting, self.saved = False, -1

    def state_dict(self) -> dict:
        return {"best": self.best}

    def load_state_dict(self, state: dict) -> None:
        self.best = state["best"]

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: Objective, checkpoint: dict
    ) -> None:
        count_running_epoch(checkpoint)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Objective, outputs, batch, batch_idx
    ) -> None:
        if not ends_step(trainer, batch_idx):
            return
        step = trainer.global_step
        due = step % self.every_n_steps == 0 or step == last_step(trainer) or trainer.should_stop
        self.waiting = due and validates_now(trainer)
        if due and not self.waiting:
            self.save_step(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Objective) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if self.metric is not None:
            self._save_if_better(
                trainer, float(trainer.callback_metrics[f"val/{self.metric.name}"])
            )
        if self.waiting:
            self.waiting = False
            self.save_step(trainer)

    def _save_if_better(self, trainer: L.Trainer, value: float) -> None:
        if not self.metric.better(value, self.metric.worst if self.best is None else self.best):
            return
        before, self.best = self.best, value  # the checkpoint holds its own score
        if not self._save(trainer, "best.ckpt"):
            self.best = before

    def save_step(self, trainer: L.Trainer) -> bool:
        """Save the state after this step, and remove all but the newest two before it. False: it is not finite."""
        if self.saved == trainer.global_step:
            return True
        name = f"step-{trainer.global_step:08d}.ckpt"
        if not self._save(trainer, name):
            return False
        self.saved = trainer.global_step
        if trainer.is_global_zero:
            for path in sorted(p for p in self.folder.glob("step-*.ckpt") if p.name <= name)[
                :-KEPT
            ]:
                path.unlink(missing_ok=True)
        return True

    def _save(self, trainer: L.Trainer, name: str) -> bool:
        if not finite(trainer.lightning_module):
            rank_zero_info(f"step {trainer.global_step} is not finite: {name} is not written")
            return False
        problem = None
        try:
            trainer.save_checkpoint(self.folder / name)
        except OSError as error:
            trainer.strategy.barrier()  # the other ranks wait at the one that ends save_checkpoint
            problem = str(error)
        problem = trainer.strategy.broadcast(problem)
        if problem is not None:
            raise RunStopped(
                f"stopped at step {trainer.global_step}: {problem}. The older checkpoints are intact"
            )
        return True


def finite(module: Objective) -> bool:
    """Whether weights and statistics are finite, and the newest step was not skipped. Waits for the device."""
    values = [v for v in module.state_dict().values() if v.is_floating_point() and v.numel()]
    largest = nn.utils.get_total_norm(values, norm_type=math.inf)
    return bool(largest.isfinite()) and not bool(module.skipped_last)
