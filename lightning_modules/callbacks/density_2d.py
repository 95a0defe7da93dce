"""A picture of a density in the plane, and a check that it integrates to 1."""

from pathlib import Path
from typing import cast

import lightning.pytorch as L
import numpy as np
import torch
from torch import Tensor

from lightning_modules.callbacks.png import write_png
from lightning_modules.density import DensityModule
from lightning_modules.lightning_internals import datamodule_of
from lightning_modules.numerics import FAILURES, report_failure
from lightning_modules.precision import evaluation
from lightning_modules.stopping import writing


class Density2d(L.Callback):
    """Logs `density_integral` after testing, and draws density.png: data, samples and density.

    The integral is the sum of the density over a grid, times the area of a cell. The module has to
    be a `DensityModule` of points.

    folder: the folder of the picture.
    n: how many data points and how many samples are shown.
    box: (left, right, bottom, top) of the grid.
    cell: the spacing of the grid; features of width sigma need cell <= sigma / 2.
    seed: the seed of the samples.
    """

    def __init__(
        self,
        folder: str | Path,
        n: int,
        box: tuple[float, float, float, float] = (-2.5, 3.5, -2.0, 2.5),
        cell: float = 0.0125,
        seed: int = 0,
    ) -> None:
        self.path = Path(folder) / "density.png"
        self.n = n
        self.box = box
        self.cell = cell
        self.seed = seed

    @torch.no_grad()
    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        module = cast(DensityModule, pl_module)
        with evaluation(module.device.type):
            density = self._density(module)
            samples = self._sample(module)
        module.log("density_integral", float(density.sum() * self.cell**2), rank_zero_only=True)
        with writing(trainer, self.path):
            if trainer.is_global_zero:
                test = datamodule_of(trainer).test
                data = torch.stack([test[0, i][0] for i in range(min(self.n, len(test)))])
                self._draw(data.numpy(), samples.cpu().numpy(), density)

    def _sample(self, module: DensityModule) -> Tensor:
        """n samples, (n, 2), or (0, 2) if drawing them fails (`FAILURES`)."""
        samples = None
        try:
            samples = module.draw(self.n, 1.0, self.seed)
        except FAILURES as error:
            report_failure("samples", error)
        return torch.empty(0, 2) if samples is None else samples

    def _density(self, module: DensityModule) -> np.ndarray:
        """The density at the centres of the grid's cells, (rows, columns)."""
        left, right, bottom, top = self.box
        xs = torch.arange(left + self.cell / 2, right, self.cell)
        ys = torch.arange(bottom + self.cell / 2, top, self.cell)
        grid = torch.cartesian_prod(ys, xs).flip(1)
        log_prob = [module.log_prob(part.to(module.device)).cpu() for part in grid.split(16_384)]
        return torch.cat(log_prob).double().exp().view(len(ys), len(xs)).numpy()

    def _draw(self, data: np.ndarray, samples: np.ndarray, density: np.ndarray) -> None:
        """Draw data, (n, 2), samples, (n, 2), and the density, (rows, columns), side by side."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(12, 3.6), layout="constrained")
        FigureCanvasAgg(figure)
        left, middle, right = figure.subplots(1, 3, sharex=True, sharey=True)
        for axes, title in ((left, "data"), (middle, "samples"), (right, "density")):
            axes.set(title=title, aspect="equal", xlim=self.box[:2], ylim=self.box[2:])
        for axes, points in ((left, data), (middle, samples)):
            axes.plot(*points.T, ",", color="#204080", alpha=0.5)
        finite = density[np.isfinite(density)]
        right.imshow(
            density,
            origin="lower",
            extent=self.box,
            cmap="viridis",
            vmax=np.quantile(finite, 0.999) if finite.size else None,
        )
        write_png(self.path, lambda stream: figure.savefig(stream, dpi=100))
