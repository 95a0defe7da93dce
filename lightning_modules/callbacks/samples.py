"""What the flow draws, and whether it inverts: pictures a person can open."""

from pathlib import Path

import lightning.pytorch as L
import torch
from torch import Tensor

from flows.base import FlowModel
from flows.caching import cached
from lightning_modules.noise import evaluation_input
from lightning_modules.precision import evaluation

N_SHOWN = 16  # pictures a row


class Samples(L.Callback):
    """After validations: a grid of samples, a row a temperature, and reconstructions, as uint8 PNGs in `folder`.

    The base samples are the same at every validation, so the grids show one picture learning. Logs
    `samples/finite_T<temperature>`, the share of samples whose every value is finite; a flow can have a fine
    likelihood and inverses that overflow. Drawn in float32 from the
    weights as trained, not from the best ones.

    n: samples a temperature for that share, of which 16 are shown. every_n_steps: at most so often.
    """

    def __init__(self, folder: Path, temperatures: list[float], n: int, every_n_steps: int, seed: int = 0) -> None:
        if n < 1 or not temperatures:
            raise ValueError(
                f"samples.n={n} at samples.temperatures={list(temperatures)} draws nothing: give at least 1"
            )
        self.folder, self.temperatures, self.n, self.seed = Path(folder), temperatures, n, seed
        self.every_n_steps, self.drawn_at = every_n_steps, 0
        self.images: Tensor | None = None
        self.context: Tensor | None = None  # of the images
        self.finite: dict[str, float] = {}

    def state_dict(self) -> dict:
        return {"drawn_at": self.drawn_at, "finite": self.finite}

    def load_state_dict(self, state: dict) -> None:
        self.drawn_at, self.finite = state["drawn_at"], state["finite"]

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        if batch_idx == 0 and pl_module.dequantizer is not None:
            data, indices = batch[0][:N_SHOWN], batch[1][:N_SHOWN]
            self.context = batch[2][:N_SHOWN] if len(batch) > 2 else None
            self.images = evaluation_input(pl_module.dequantizer, data, indices, pl_module.noise_seed)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking and trainer.global_step >= self.drawn_at + self.every_n_steps:
            self._draw(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step > self.drawn_at:
            self._draw(trainer, pl_module)

    @torch.no_grad()
    def _draw(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.drawn_at = trainer.global_step
        if not trainer.is_global_zero or len(pl_module.flow.shape) != 3:
            return
        was_training = pl_module.flow.training
        pl_module.flow.eval()
        with evaluation(pl_module.device.type), cached(pl_module.flow):
            rows = self._sample(pl_module)
            pictures = {"samples": picture(rows, pl_module.n_bits)}
            if self.images is not None:
                z, _ = pl_module.flow(self.images, self.context)
                again, _ = pl_module.flow.inverse(z, self.context)
                pictures["reconstruction"] = picture([self.images, again], pl_module.n_bits)
        pl_module.flow.train(was_training)
        self._write(trainer, pictures)

    def _sample(self, pl_module: L.LightningModule) -> list[Tensor]:
        rows = []
        for temperature in self.temperatures:
            samples = drawn(pl_module.flow, self.n, temperature, self.seed)
            rows.append(samples[:N_SHOWN])
            self.finite[f"samples/finite_T{temperature:g}"] = finite_share(samples)
        return rows

    def _write(self, trainer: L.Trainer, pictures: dict[str, Tensor]) -> None:
        from PIL import Image

        self.folder.mkdir(parents=True, exist_ok=True)
        for name, image in pictures.items():
            array = image.permute(1, 2, 0).numpy()
            Image.fromarray(array).save(self.folder / f"{name}-{trainer.global_step:07d}.png")
            if hasattr(trainer.logger, "log_image"):  # W&B; uint8, since it logs floats in [0, 1] as black
                trainer.logger.log_image(f"pictures/{name}", [array], step=trainer.global_step)
        if trainer.logger is not None:
            trainer.logger.log_metrics(self.finite, step=trainer.global_step)


def drawn(flow: FlowModel, n: int, temperature: float, seed: int) -> Tensor:
    """n samples, (n, *shape), of the same eps at every temperature; of a class-conditional flow its classes in turn."""
    generator = torch.Generator().manual_seed(seed)
    if flow.n_classes is None:
        return flow.sample(n, temperature, generator=generator)
    classes = torch.arange(n, device=next(flow.parameters()).device) % flow.n_classes
    return flow.sample(1, temperature, classes, generator=generator)[0]


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
