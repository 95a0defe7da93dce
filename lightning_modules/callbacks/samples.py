"""What a model draws, and what it makes of data: pictures a person can open."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor, nn

from flows.caching import cached
from lightning_modules.callbacks.png import write_png
from lightning_modules.checks import check_count
from lightning_modules.numerics import FAILURES, say_failed
from lightning_modules.objective import Objective, as_objective
from lightning_modules.precision import evaluation
from lightning_modules.stopping import writing
from results import is_number

N_SHOWN = 16  # pictures a row
LARGEST_N = 100_000  # samples that are drawn at once: more do not fit into memory


class Samples(L.Callback):
    """Draws samples and reconstructions after validations, as uint8 PNGs in `folder`.

    The samples are a grid with a row for each temperature. The base samples are the same at every
    validation, so the grids show the same pictures as they are learned. They are drawn in float32
    from the weights as trained, not from the best ones. Nothing is drawn where the objective's data
    are no images.

    It logs `samples/finite_T<temperature>`, the share of samples whose every value is finite
    (`samples/finite` of an objective without temperatures): a flow can have a good likelihood and
    an inverse that overflows. The share is 0 where a layer cannot be inverted at all.

    temperatures: one for each row.
    n: samples for each temperature, of which 16 are shown.
    every_n_steps: pictures are drawn at validations that are at least so many steps apart.
    seed: of the base samples.
    ValueError, one line: one of them is out of its range.
    """

    def __init__(
        self,
        folder: str | Path,
        temperatures: Sequence[float],
        n: int,
        every_n_steps: int,
        seed: int = 0,
    ) -> None:
        check_temperatures(temperatures)
        check_count("samples.n", n, least=1, most=LARGEST_N)
        check_count("samples.every_n_steps", every_n_steps, least=1)
        check_count("samples.seed", seed)
        self.folder = Path(folder)
        self.temperatures = temperatures
        self.n = n
        self.every_n_steps = every_n_steps
        self.seed = seed
        self.drawn_at = 0  # the step of the newest pictures
        self.batch: list[Tensor] | None = None  # the first validation data
        self.finite: dict[str, float] = {}  # what is logged

    def state_dict(self) -> dict[str, Any]:
        """The step of the newest pictures, and the shares of finite samples."""
        return {"drawn_at": self.drawn_at, "finite": self.finite}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.drawn_at = state_dict["drawn_at"]
        self.finite = state_dict["finite"]

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if batch_idx == 0:
            self.batch = [part[:N_SHOWN] for part in batch]

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        due = trainer.global_step >= self.drawn_at + self.every_n_steps
        if due and not trainer.sanity_checking:
            self._draw(trainer, as_objective(pl_module))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step > self.drawn_at:
            self._draw(trainer, as_objective(pl_module))

    @torch.no_grad()
    def _draw(self, trainer: L.Trainer, objective: Objective) -> None:
        """Draw, write and log on rank 0; every rank has to call it."""
        self.drawn_at = trainer.global_step
        if objective.shape is None or len(objective.shape) != 3:
            return
        pictures: dict[str, Tensor] = {}
        if trainer.is_global_zero:
            pictures = self._pictures(objective)
        with writing(trainer, self.folder):
            for name, image in pictures.items():
                self._write(self.folder / f"{name}-{trainer.global_step:07d}.png", image)
        if trainer.is_global_zero:
            self._log(trainer, pictures)

    def _pictures(self, objective: Objective) -> dict[str, Tensor]:
        """Pictures, (3, height, width) uint8, by name; those are left out that cannot be drawn."""
        rows: dict[str, list[Tensor]] = {}
        failures: dict[str, BaseException] = {}
        with evaluating(objective), evaluation(objective.device.type), cached(objective.trained):
            rows["samples"] = self._sample(objective, failures)
            rows["reconstruction"] = self._reconstruct(objective, failures)
        if failures:
            say_failed(", ".join(failures), next(iter(failures.values())))
        n_bits = objective.n_bits or 8
        return {name: picture(images, n_bits) for name, images in rows.items() if images}

    def _sample(self, objective: Objective, failures: dict[str, BaseException]) -> list[Tensor]:
        """A row for each temperature, or one row; empty where the objective draws nothing.

        failures: takes what the model's numbers did not allow.
        """
        rows: list[Tensor] = []
        for temperature in self.temperatures if objective.has_temperature else (1.0,):
            suffix = f"_T{temperature:g}" if objective.has_temperature else ""
            try:
                samples = objective.draw(self.n, temperature, self.seed, self.batch)
            except FAILURES as error:
                failures[f"samples{suffix}"] = error
                self.finite[f"samples/finite{suffix}"] = 0.0
                continue
            if samples is None:
                return []
            rows.append(samples[:N_SHOWN])
            self.finite[f"samples/finite{suffix}"] = finite_share(samples)
        return rows

    def _reconstruct(
        self, objective: Objective, failures: dict[str, BaseException]
    ) -> list[Tensor]:
        """A row of validation data and one of their reconstructions, or nothing."""
        if self.batch is None:
            return []
        try:
            pair = objective.reconstruct(self.batch)
        except FAILURES as error:
            failures["reconstructions"] = error
            return []
        return [] if pair is None else list(pair)

    def _write(self, path: Path, image: Tensor) -> None:
        from PIL import Image

        picture_of = Image.fromarray(as_array(image))
        write_png(path, lambda stream: picture_of.save(stream, "PNG"))

    def _log(self, trainer: L.Trainer, pictures: dict[str, Tensor]) -> None:
        """Log the pictures, to W&B alone, and the shares."""
        if isinstance(trainer.logger, WandbLogger):
            for name, image in pictures.items():
                # uint8, since W&B shows floats in [0, 1] as black.
                trainer.logger.log_image(
                    f"pictures/{name}", [as_array(image)], step=trainer.global_step
                )
        if trainer.logger is not None and self.finite:
            trainer.logger.log_metrics(self.finite, step=trainer.global_step)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put all modules of a model into eval mode, and afterwards back into the mode of each."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def check_temperatures(temperatures: Sequence[float]) -> None:
    """Refuse what is no list of numbers of at least 0. ValueError, one line."""
    is_list = isinstance(temperatures, Sequence) and not isinstance(temperatures, str)
    if not is_list or not temperatures or not all(is_number(t) and t >= 0 for t in temperatures):
        raise ValueError(
            f"samples.temperatures={temperatures} is no list of numbers that are not negative: "
            "give at least 1, for example samples.temperatures=[0.7]"
        )


def finite_share(samples: Tensor) -> float:
    """The share of samples (n, *shape) whose every value is finite.

    >>> finite_share(torch.tensor([[0.0, 1.0], [0.0, float("inf")]]))
    0.5
    """
    return samples.isfinite().flatten(1).all(1).float().mean().item()


def picture(rows: list[Tensor], n_bits: int) -> Tensor:
    """Rows of images in [0, 1], each (N, C, H, W), as one uint8 picture, (3, height, width).

    A pixel has the lower end of its bin among the 2^n_bits, as in the code of Glow's authors. What
    is not finite is black.
    """
    from torchvision.utils import make_grid

    images = torch.cat(rows).float().cpu().nan_to_num(0.0, 0.0, 0.0)
    levels = ((images * 2**n_bits).floor() * 2 ** (8 - n_bits)).clamp(0, 255).to(torch.uint8)
    grid = make_grid(levels, nrow=len(rows[0]), pad_value=255)
    scale = max(1, 64 // images.shape[-1])
    return grid.repeat_interleave(scale, 1).repeat_interleave(scale, 2)


def as_array(image: Tensor) -> np.ndarray:
    """A picture (3, height, width) as PIL takes it, (height, width, 3)."""
    return image.permute(1, 2, 0).numpy()
