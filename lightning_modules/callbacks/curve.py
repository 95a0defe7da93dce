"""The learning curve of a run, as a table and as a picture."""

import csv
import io
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.utilities import rank_zero_info

from lightning_modules.objective import as_objective
from lightning_modules.optimizer_steps import ends_step, last_step, validates_now
from lightning_modules.stopping import writing
from results.curves import curve
from results.drawing import png
from results.files import write
from results.metrics import Metric

Row = dict[str, Any]  # a row of curve.csv; None is an empty cell


class Curve(L.Callback):
    """Writes a row of curve.csv at each validation, and curve.png at the end of training.

    The first row is for step 0, before training. The columns are step, images (seen in training),
    seconds (of training and validation, including those before a resume), lr, train/M (the mean
    since the previous row) and val/M, where M is the first metric of the objective. Without a
    validation set a row is written every `interval` steps.

    folder: the folder of both files. batch_size: the size of a global batch.
    papers: the papers' claims that the run is compared with, each {"metric", "value", "decimals",
        "comparable"}; the claim on M is drawn as a line if the run can be compared with it.
    title: of the picture, such as the names of the experiment and of the run.
    """

    def __init__(
        self,
        folder: str | Path,
        batch_size: int,
        interval: int,
        papers: list[dict[str, Any]],
        title: str = "",
    ) -> None:
        self.folder = Path(folder)
        self.batch_size = batch_size
        self.interval = interval
        self.papers = papers
        self.title = title
        self.started = time.monotonic()
        self.seconds_before = 0.0
        self.rows: list[Row] = []

    @property
    def path(self) -> Path:
        return self.folder / "curve.csv"

    @property
    def seconds(self) -> float:
        """Wall time of the run, including the time before a resume."""
        return self.seconds_before + time.monotonic() - self.started

    def state_dict(self) -> dict[str, Any]:
        """The rows so far, and the wall time."""
        return {"seconds": self.seconds, "rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds_before = state_dict["seconds"]
        self.rows = state_dict["rows"]

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the sum for the train/M of the next row, over all ranks."""
        mean = as_objective(pl_module).train_mean
        with mean.sync_context():
            checkpoint["train_mean"] = {"total": mean.total.clone(), "n": mean.n.clone()}

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Load the sum for the train/M of the next row, all of it on rank 0."""
        saved = checkpoint["train_mean"]
        mean = as_objective(pl_module).train_mean
        if saved["n"] > 0:
            # After this empty update, all ranks take part in computing the mean.
            mean.update(mean.total.new_empty(0))
        if trainer.is_global_zero:
            mean.total = saved["total"].to(mean.device)
            mean.n = saved["n"].to(mean.device)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            self.started = time.monotonic()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write(trainer)  # removes rows that are newer than the checkpoint of a resumed run

    def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._add(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._add(trainer, pl_module)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if not ends_step(trainer, batch_idx) or validates_now(trainer):
            return
        due = sum(trainer.num_val_batches) == 0 and trainer.global_step % self.interval == 0
        if due or trainer.global_step == last_step(trainer):  # before the checkpoint of this step
            self._add(trainer, pl_module, after_validation=False)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.rows or self.rows[-1]["step"] < trainer.global_step:
            self._add(trainer, pl_module, after_validation=False)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        path = self.folder / "curve.png"
        metric = as_objective(pl_module).metric
        claims = [paper for paper in self.papers if paper["comparable"]]
        picture = None
        if trainer.is_global_zero:
            picture = curve(self.rows, self.title, metric.unit, metric.direction, claims)
        with writing(trainer, path):
            if picture is not None:
                write(path, png(picture))

    def validation_result(self, metric: Metric, best: bool) -> dict[str, float]:
        """{"val/M": value} of the best or the last validation after step 0; empty if there is none.

        best: whether to take the best validation, not the last one.
        """
        key = f"val/{metric.name}"
        values = [row[key] for row in self.rows[1:] if row[key] is not None]
        if not values:
            return {}
        return {key: metric.best(values) if best else values[-1]}

    def _add(
        self, trainer: L.Trainer, pl_module: L.LightningModule, after_validation: bool = True
    ) -> None:
        """Add a row, write the file, and log the row.

        after_validation: whether a validation has just ended, whose value belongs to the row.
        """
        objective = as_objective(pl_module)
        step = trainer.global_step
        train_key = f"train/{objective.metric.name}"
        val_key = f"val/{objective.metric.name}"
        train = None
        if objective.train_mean.update_called:
            train = objective.train_mean.compute().item()
        objective.train_mean.reset()
        val = None
        if after_validation and val_key in trainer.callback_metrics:
            val = trainer.callback_metrics[val_key].item()
        row = {
            "step": step,
            "images": step * self.batch_size,
            "seconds": round(self.seconds, 1),
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            train_key: train,
            val_key: val,
        }
        self.rows.append(row)
        self._write(trainer)
        if step == 0 and val is not None and trainer.logger is not None:
            # Lightning itself does not log the validation before training.
            trainer.logger.log_metrics({val_key: val}, step=0)
        values = [f"{key} {row[key]:.4f}" for key in (train_key, val_key) if row[key] is not None]
        rank_zero_info(
            f"step {step}, {row['images']:,} images, {row['seconds']:.0f} s: {', '.join(values)}"
        )

    def _write(self, trainer: L.Trainer) -> None:
        with writing(trainer, self.path):
            if trainer.is_global_zero and self.rows:
                table = io.StringIO(newline="")
                writer = csv.DictWriter(table, self.rows[0])
                writer.writeheader()
                writer.writerows(self.rows)
                write(self.path, table.getvalue())
