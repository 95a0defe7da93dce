"""What a model draws, and what it makes of data: pictures a person can open."""

from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as L
import torch
from torch import Tensor

from flows.caching import cached
from lightning_modules.objective import Objective
from lightning_modules.precision import evaluation

N_SHOWN = 16  # pictures a row


class Samples(L.Callback):
    """After validations: a grid of samples, a row a temperature, and reconstructions, as uint8 PNGs in `folder`.

    The base samples are the same at every validation, so the grids show one picture learning. Logs
    `samples/finite_T<temperature>`, the share of samples whose every value is finite (`samples/finite` of an objective
    without temperatures); a flow can have a fine likelihood and inverses that overflow. Drawn in float32 from the
    weights as trained, not from the best ones. Nothing where the objective's data are no images.

    n: samples a temperature for that share, of which 16 are shown. every_n_steps: at most so often.
    """

    def __init__(
        self, folder: Path, temperatures: Sequence[float], n: int, every_n_steps: int, seed: int = 0
    ) -> None:
        if n < 1 or not temperatures:
            raise ValueError(
                f"samples.n={n} at samples.temperatures={list(temperatures)} draws nothing: give at least 1"
            )
        self.folder, self.temperatures, self.n, self.seed = Path(folder), temperatures, n, seed
        self.every_n_steps, self.drawn_at = every_n_steps, 0
        self.batch: list[Tensor] | None = None  # the first validation data
        self.finite: dict[str, float] = {}

    def state_dict(self) -> dict:
        return {"drawn_at": self.drawn_at, "finite": self.finite}

    def load_state_dict(self, state: dict) -> None:
        self.drawn_at, self.finite = state["drawn_at"], state["finite"]

    def on_validation_batch_end(
        self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0
    ) -> None:
        if batch_idx == 0:
            self.batch = [part[:N_SHOWN] for part in batch]

    def on_validation_end(self, trainer: L.Trainer, pl_module: Objective) -> None:
        if (
            not trainer.sanity_checking
            and trainer.global_step >= self.drawn_at + self.every_n_steps
        ):
            self._draw(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: Objective) -> None:
        if trainer.global_step > self.drawn_at:
            self._draw(trainer, pl_module)

    @torch.no_grad()
    def _draw(self, trainer: L.Trainer, pl_module: Objective) -> None:
        self.drawn_at = trainer.global_step
        if not trainer.is_global_zero or pl_module.shape is None or len(pl_module.shape) != 3:
            return
        modes = {module: module.training for module in pl_module.modules()}
        pl_module.eval()
        with evaluation(pl_module.device.type), cached(pl_module.trained):
            rows = {"samples": self._sample(pl_module)}
            pair = None if self.batch is None else pl_module.reconstruct(self.batch)
            rows["reconstruction"] = [] if pair is None else list(pair)
        for module, training in modes.items():
            module.training = training
        n_bits = pl_module.n_bits or 8
        self._write(
            trainer, {name: picture(images, n_bits) for name, images in rows.items() if images}
        )

    def _sample(self, objective: Objective) -> list[Tensor]:
        """A row a temperature, or one row; none where the objective draws nothing."""
        rows = []
        for temperature in self.temperatures if objective.has_temperature else [1.0]:
            samples = objective.draw(self.n, temperature, self.seed, self.batch)
            if samples is None:
                return []
            rows.append(samples[:N_SHOWN])
            suffix = f"_T{temperature:g}" if objective.has_temperature else ""
            self.finite[f"samples/finite{suffix}"] = finite_share(samples)
        return rows

    def _write(self, trainer: L.Trainer, pictures: dict[str, Tensor]) -> None:
        from PIL import Image

        self.folder.mkdir(parents=True, exist_ok=True)
        for name, image in pictures.items():
            array = image.permute(1, 2, 0).numpy()
            Image.fromarray(array).save(self.folder / f"{name}-{trainer.global_step:07d}.png")
            if hasattr(
                trainer.logger, "log_image"
            ):  # W&B; uint8, since it logs floats in [0, 1] as black
                trainer.logger.log_image(f"pictures/{name}", [array], step=trainer.global_step)
        if trainer.logger is not None and self.finite:
            trainer.logger.log_metrics(self.finite, step=trainer.global_step)


def finite_share(samples: Tensor) -> float:
    """The share of samples (n, *shape) whose every value is finite."""
    return samples.isfinite().flatten(1).all(1).float().mean().item()


def picture(rows: list[Tensor], n_bits: int) -> Tensor:
    """Rows of images in [0, 1], each (N, C, H, W), as one uint8 picture, (3, height, width); non-finite is black.

    A pixel has the lower end of its bin among the 2^n_bits, as in Glow's authors' code.
    """
    from torchvision.utils import make_grid

    images = torch.cat(rows).float().cpu().nan_to_num(0.0, 0.0, 0.0)
    levels = ((images * 2**n_bits).floor() * 2 ** (8 - n_bits)).clamp(0, 255).to(torch.uint8)
    grid = make_grid(levels, nrow=len(rows[0]), pad_value=255)
    scale = max(1, 64 // images.shape[-1])
    return grid.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
