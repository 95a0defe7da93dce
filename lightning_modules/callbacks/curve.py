"""The learning curve as a file: what a claim about quality rests on."""

import csv
import io
import math
import time
from pathlib import Path

import lightning.pytorch as L
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from lightning_modules.objective import Objective
from lightning_modules.optimizer_steps import ends_step, last_step, validates_now
from results import printed
from results.files import write
from results.metrics import Metric


class Curve(L.Callback):
    """One row of curve.csv a validation, from step 0 (before training), and curve.png at the end of training.

    Columns: step, images (seen in training), seconds (of training and validation, over all resumed parts), lr,
    train/M (mean since the row before), val/M, with M the objective's metric. Without a validation set a row
    comes every `interval` steps all the same. batch_size: the global one. papers: the claims beside which the run is
    shown, each {"metric", "value", "decimals", "comparable"}; the one on M is drawn as a line.
    """

    def __init__(self, folder: Path, batch_size: int, interval: int, papers: list[dict]) -> None:
        self.folder, self.batch_size, self.interval, self.papers = (
            Path(folder),
            batch_size,
            interval,
            papers,
        )
        self.seconds_before = 0.0
        self.rows: list[dict] = []

    @property
    def path(self) -> Path:
        return self.folder / "curve.csv"

    @property
    def seconds(self) -> float:
        """Wall time of the run, in all its parts."""
        return self.seconds_before + time.monotonic() - self.started

    def state_dict(self) -> dict:
        return {"seconds": self.seconds, "rows": self.rows}

    def load_state_dict(self, state: dict) -> None:
        self.seconds_before, self.rows = state["seconds"], state["rows"]

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: Objective, checkpoint: dict
    ) -> None:
        """What has been summed for the next row, over all ranks."""
        mean = pl_module.train_mean
        with mean.sync_context():
            checkpoint["train_mean"] = {"total": mean.total.clone(), "n": mean.n.clone()}

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: Objective, checkpoint: dict
    ) -> None:
        saved, mean = checkpoint["train_mean"], pl_module.train_mean
        if saved["n"] > 0:
            mean.update(
                mean.total.new_empty(0)
            )  # so that all ranks know of having been updated, and compute together
        if trainer.is_global_zero:
            mean.total, mean.n = saved["total"].to(mean.device), saved["n"].to(mean.device)

    def setup(self, trainer: L.Trainer, pl_module: Objective, stage: str) -> None:
        if stage == "fit":
            self.started = time.monotonic()

    def on_fit_start(self, trainer: L.Trainer, pl_module: Objective) -> None:
        self._write()  # a resumed run's file may hold rows from after its checkpoint

    def on_sanity_check_end(self, trainer: L.Trainer, pl_module: Objective) -> None:
        self._add(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Objective) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._add(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Objective, outputs, batch, batch_idx
    ) -> None:
        if not ends_step(trainer, batch_idx) or validates_now(trainer):
            return
        due = sum(trainer.num_val_batches) == 0 and trainer.global_step % self.interval == 0
        if due or trainer.global_step == last_step(trainer):  # before the checkpoint of this step
            self._add(trainer, pl_module, fresh=False)

    def on_train_end(self, trainer: L.Trainer, pl_module: Objective) -> None:
        if not self.rows or self.rows[-1]["step"] < trainer.global_step:
            self._add(trainer, pl_module, fresh=False)

    def on_fit_end(self, trainer: L.Trainer, pl_module: Objective) -> None:
        if trainer.is_global_zero and self.rows:
            draw_curve(self.rows, self.folder / "curve.png", self.papers)

    def validated(self, metric: Metric, best: bool) -> dict[str, float]:
        """{"val/M": the best or else the last validation value after step 0}, empty where there was none."""
        key = f"val/{metric.name}"
        values = [row[key] for row in self.rows[1:] if row[key] is not None]
        if not values:
            return {}
        return {key: metric.best(values) if best else values[-1]}

    def _add(self, trainer: L.Trainer, pl_module: Objective, fresh: bool = True) -> None:
        metric, step = pl_module.metric.name, trainer.global_step
        train = (
            pl_module.train_mean.compute().item() if pl_module.train_mean.update_called else None
        )
        pl_module.train_mean.reset()
        val = trainer.callback_metrics.get(f"val/{metric}") if fresh else None
        row = {
            "step": step,
            "images": step * self.batch_size,
            "seconds": round(self.seconds, 1),
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            f"train/{metric}": train,
            f"val/{metric}": None if val is None else val.item(),
        }
        self.rows.append(row)
        self._write()
        if (
            step == 0 and trainer.logger is not None and val is not None
        ):  # Lightning logs nothing of its sanity check
            trainer.logger.log_metrics({f"val/{metric}": val.item()}, step=0)
        values = [
            f"{key} {row[key]:.4f}"
            for key in (f"train/{metric}", f"val/{metric}")
            if row[key] is not None
        ]
        rank_zero_info(
            f"step {step}, {row['images']:,} images, {row['seconds']:.0f} s: {', '.join(values)}"
        )

    @rank_zero_only
    def _write(self) -> None:
        if not self.rows:
            return
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, self.rows[0])
        writer.writeheader()
        writer.writerows(self.rows)
        write(self.path, table.getvalue())


def draw_curve(rows: list[dict], path: Path, papers: list[dict]) -> None:
    """val and train over images seen, as PNG; non-finite values are left out.

    Of the papers' values the one of the curve's own metric is drawn, dashed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="training images seen")
    for key in [k for k in rows[0] if "/" in k]:
        points = [
            (r["images"], r[key]) for r in rows if r[key] is not None and math.isfinite(r[key])
        ]
        axes.plot(*zip(*points, strict=True), label=key, marker=".") if points else None
    values = [
        r[k] for r in rows[1:] for k in r if "/" in k and r[k] is not None and math.isfinite(r[k])
    ]
    paper = next(
        (paper for paper in papers if f"val/{paper['metric'].split('/')[-1]}" in rows[0]), None
    )
    if paper is not None:
        data = "" if paper["comparable"] else " (on other data)"
        axes.axhline(
            paper["value"],
            linestyle="--",
            color="grey",
            label=f"paper {printed(paper['value'], paper)}{data}",
        )
    if values:
        shown = [*values, paper["value"] if paper else values[0]]
        low, high = min(shown), max(shown)
        axes.set_ylim(low - 0.05 * (high - low) - 0.01, high + 0.1 * (high - low) + 0.01)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
