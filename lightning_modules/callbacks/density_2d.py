"""A density in the plane: does it integrate to 1, and what does it look like?"""

from pathlib import Path

import lightning.pytorch as L
import numpy as np
import torch

from lightning_modules.density import DensityModule
from lightning_modules.precision import evaluation


class Density2d(L.Callback):
    """After testing: `density_integral`, the density summed over a grid, and density.png: data, samples, density.

    For a `DensityModule` of points, which can draw and has a `log_prob`.

    box: (left, right, bottom, top) of the grid. cell: its spacing; features of width sigma need cell <= sigma / 2.
    n: points shown of the data and of the samples.
    """

    def __init__(
        self,
        folder: str | Path,
        n: int,
        box: tuple[float, float, float, float] = (-2.5, 3.5, -2.0, 2.5),
        cell: float = 0.0125,
        seed: int = 0,
    ) -> None:
        self.folder, self.n, self.box, self.cell, self.seed = Path(folder), n, box, cell, seed

    @torch.no_grad()
    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: DensityModule) -> None:
        with evaluation(pl_module.device.type):
            density = self._density(pl_module)
            samples = pl_module.draw(self.n, 1.0, self.seed)
        pl_module.log("density_integral", float(density.sum() * self.cell**2), rank_zero_only=True)
        if trainer.is_global_zero:
            data = torch.stack(
                [
                    trainer.datamodule.test[0, i][0]
                    for i in range(min(self.n, len(trainer.datamodule.test)))
                ]
            )
            self._draw(data.numpy(), samples.cpu().numpy(), density)

    def _density(self, pl_module: DensityModule) -> np.ndarray:
        """p at the centres of the grid's cells, (rows, columns)."""
        left, right, bottom, top = self.box
        xs = torch.arange(left + self.cell / 2, right, self.cell)
        ys = torch.arange(bottom + self.cell / 2, top, self.cell)
        grid = torch.cartesian_prod(ys, xs).flip(1)
        log_prob = [
            pl_module.log_prob(part.to(pl_module.device)).cpu() for part in grid.split(16_384)
        ]
        return torch.cat(log_prob).double().exp().view(len(ys), len(xs)).numpy()

    def _draw(self, data: np.ndarray, samples: np.ndarray, density: np.ndarray) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(12, 3.6), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, 3, sharex=True, sharey=True)
        for ax, title, points in zip(
            axes, ("data", "samples", "density"), (data, samples, None), strict=True
        ):
            ax.set(title=title, aspect="equal", xlim=self.box[:2], ylim=self.box[2:])
            if points is not None:
                ax.plot(*points.T, ",", color="#204080", alpha=0.5)
            else:
                ax.imshow(
                    density,
                    origin="lower",
                    extent=self.box,
                    cmap="viridis",
                    vmax=np.quantile(density, 0.999),
                )
        figure.savefig(self.folder / "density.png", dpi=100)
