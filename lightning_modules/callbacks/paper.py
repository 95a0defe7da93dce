"""The paper's number beside ours."""

import lightning.pytorch as L

COLUMNS = ("experiment", "metric", "paper", "ours", "gap", "status")


class PaperComparison(L.Callback):
    """Logs `paper/<metric>` at validations and, on the claim's own data, `gap/<metric>` = ours - paper.

    During training ours is the validation value; the row that is reported uses the claim's own split.
    paper: {"claim", "metric", "value", "comparable"} or None.
    """

    def __init__(self, paper: dict | None) -> None:
        self.paper = paper

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.paper is None or trainer.sanity_checking:
            return
        name = self.paper["metric"].split("/")[-1]
        pl_module.log(f"paper/{name}", self.paper["value"])
        ours = trainer.callback_metrics.get(f"val/{name}")
        if ours is not None and self.paper["comparable"]:
            pl_module.log(f"gap/{name}", ours - self.paper["value"])


def comparison_rows(result: dict) -> list[tuple]:
    """COLUMNS for each test metric; paper and gap are None where the metric has no claim or is not comparable."""
    paper, rows = result["paper"], []
    for metric, ours in sorted(result["metrics"].items()):
        if not metric.startswith("test/") and metric != "density_integral":
            continue
        claimed = paper is not None and metric == paper["metric"]
        value, gap, status = (paper["value"], result["gap"], result["status"]) if claimed else (None, None, "-")
        rows.append((result["experiment"], metric, value, ours, gap, status))
    return rows


def comparison_table(result: dict) -> str:
    """The last lines of a run: COLUMNS, a row a test metric."""
    rows = [COLUMNS]
    for experiment, metric, value, ours, gap, status in comparison_rows(result):
        shown = "-" if value is None else f"{value:g}", f"{ours:.4f}", "-" if gap is None else f"{gap:+.3f}"
        rows.append((experiment, metric, *shown, status))
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
