"""Pictures of a model's samples and reconstructions, drawn during training."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from flows.caching import cached
from flows.coupling import SigmoidCoupling
from lightning_modules.callbacks.png import write_png
from lightning_modules.checks import check_count
from lightning_modules.numerics import FAILURES, report_failure
from lightning_modules.objective import Objective, as_objective
from lightning_modules.precision import evaluation
from lightning_modules.stopping import writing
from results import is_number

SAME = 1e-3  # largest difference of images that look the same, below one of 256 grey levels
N_SHOWN = 16  # images in a row
LABEL_SPACE = 8  # pixels on the left and on the right of a row's label
LONGEST_LABEL = 24  # characters; the name of a class can be longer
NOT_FINITE = (255, 0, 255)  # magenta, which photographs and grey images do not have
LARGEST_N = 100_000  # more samples, which are drawn at once, would not fit into memory


class Samples(L.Callback):
    """Draws samples and reconstructions after validations, as uint8 PNGs in `folder`.

    The samples form a grid with a row for each temperature, which is written beside it. At
    temperature 0 all samples are the same, so that row is left out beside others. The base samples
    are the same at every validation, so the grids show how the same images change during training.
    Samples are drawn in float32 with the current weights, not with the best ones. Nothing is drawn
    if the data of the objective are not images.

    The callback logs `samples/finite_T<temperature>` (`samples/finite` for an objective without
    temperatures): the share of samples of which every value is finite. A flow can have a good
    likelihood although its inverse overflows. The share is 0 if a layer cannot be inverted at all.
    Pixels that are not finite are magenta in the pictures. When the share of a temperature falls
    below 1, one line says so, and what helps.

    temperatures: the temperature of each row.
    n: the number of samples for each temperature, of which 16 are shown.
    every_n_steps: the smallest number of steps between two validations at which pictures are drawn.
    seed: the seed of the base samples.
    Raises ValueError: one of them is out of its range.
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
        self.finite: dict[str, float] = {}  # key in the log -> share of finite samples
        self.labels: list[str] = []  # of the rows of the newest picture of samples
        self.reported: set[str] = set()  # keys whose share was below 1 at the newest pictures

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
        """name -> picture, (3, height, width) uint8, without those that cannot be drawn."""
        failures: dict[str, BaseException] = {}
        with evaluating(objective), evaluation(objective.device.type), cached(objective.trained):
            samples = shown(self._sample(objective, failures))
            reconstruction = self._reconstruct(objective, failures)
        if failures:
            report_failure(", ".join(failures), next(iter(failures.values())))
        self._report_shares(objective, failures)
        n_bits = objective.n_bits or 8
        pictures: dict[str, Tensor] = {}
        self.labels = list(samples)
        if samples:
            pictures["samples"] = picture(list(samples.values()), n_bits, list(samples))
        if reconstruction:
            labels = ("data", "reconstruction")
            pictures["reconstruction"] = picture(reconstruction, n_bits, labels)
        return pictures

    def _sample(
        self, objective: Objective, failures: dict[str, BaseException]
    ) -> dict[str, Tensor]:
        """label -> a row of samples, such as "T=0.7"; empty if the objective draws none.

        There is a row for each temperature, or one with an empty label.

        failures: the dict to which errors of the kinds FAILURES are added, by name of the samples.
            They are added without their tracebacks, which refer to the tensors of the failed
            computation, and would keep them in memory.
        """
        rows: dict[str, Tensor] = {}
        for temperature in self.temperatures if objective.has_temperature else (1.0,):
            suffix = f"_T{temperature:g}" if objective.has_temperature else ""
            label = suffix.replace("_T", "T=")
            try:
                samples = objective.draw(self.n, temperature, self.seed, self.batch)
            except FAILURES as error:
                failures[f"samples{suffix}"] = error.with_traceback(None)
                self.finite[f"samples/finite{suffix}"] = 0.0
                continue
            if samples is None:
                return {}
            rows[label] = samples[:N_SHOWN]
            self.finite[f"samples/finite{suffix}"] = finite_share(samples)
        return rows

    def _report_shares(self, objective: Objective, failures: dict[str, BaseException]) -> None:
        """Print one line if the share of a temperature has fallen below 1 since the last pictures.

        failures: names of samples that could not be drawn at all, which have a line of their own.
        """
        broken = {
            key: share
            for key, share in self.finite.items()
            if share < 1 and key.replace("/finite", "") not in failures
        }
        if broken.keys() - self.reported:
            rank_zero_info(shares_line(broken, advice(objective)))
        self.reported = set(broken)

    def _reconstruct(
        self, objective: Objective, failures: dict[str, BaseException]
    ) -> list[Tensor]:
        """A row of validation data and a row of their reconstructions, or no row."""
        if self.batch is None:
            return []
        try:
            pair = objective.reconstruct(self.batch)
        except FAILURES as error:
            failures["reconstructions"] = error.with_traceback(None)
            return []
        return [] if pair is None else list(pair)

    def _write(self, path: Path, image: Tensor) -> None:
        from PIL import Image

        picture_of = Image.fromarray(as_array(image))
        write_png(path, lambda stream: picture_of.save(stream, "PNG"))

    def _log(self, trainer: L.Trainer, pictures: dict[str, Tensor]) -> None:
        """Log the shares of finite samples, and the pictures if the logger is W&B."""
        if isinstance(trainer.logger, WandbLogger):
            for name, image in pictures.items():
                # uint8, since W&B shows floats in [0, 1] as black.
                trainer.logger.log_image(
                    f"pictures/{name}",
                    [as_array(image)],
                    step=trainer.global_step,
                    caption=[caption(name, trainer.global_step, self.labels)],
                )
        if trainer.logger is not None and self.finite:
            trainer.logger.log_metrics(self.finite, step=trainer.global_step)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put all modules of a model into eval mode, and restore the mode of each afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def check_temperatures(temperatures: Sequence[float]) -> None:
    """Refuse temperatures that are not a list of numbers from 0 on. Raises ValueError."""
    is_list = isinstance(temperatures, Sequence) and not isinstance(temperatures, str)
    if not is_list or not temperatures or not all(is_number(t) and t >= 0 for t in temperatures):
        raise ValueError(
            f"samples.temperatures={temperatures} is not a list of numbers from 0 on: "
            "give one or more, for example samples.temperatures=[0.7]"
        )


def finite_share(samples: Tensor) -> float:
    """The share of samples, (n, *shape), of which every value is finite.

    >>> finite_share(torch.tensor([[0.0, 1.0], [0.0, float("inf")]]))
    0.5
    """
    return samples.isfinite().flatten(1).all(1).float().mean().item()


def shares_line(shares: dict[str, float], helps: str) -> str:
    """The line that reports samples that are not finite.

    shares: key in the log -> share of finite samples, below 1. helps: what a user can try.

    >>> shares_line({"samples/finite_T0.7": 0.625}, "a smaller optim.lr")[:54]
    'Some samples are not finite: only 62.5% are at T=0.7. '
    """
    parts = []
    for key, share in shares.items():
        temperature = key.partition("_T")[2]
        place = f" at T={temperature}" if temperature else ""
        parts.append(f"{min(share, 0.999):.1%} are{place}")
    return (
        f"Some samples are not finite: only {', '.join(parts)}. The inverse of the model overflows "
        "there, although the likelihood can be good. Such pixels are magenta in the pictures. "
        f"What helps: {helps}"
    )


def advice(objective: Objective) -> str:
    """What makes more samples of an objective finite."""
    options = []
    bounds = [
        module.min_scale
        for module in objective.trained.modules()
        if isinstance(module, SigmoidCoupling)
    ]
    if bounds:
        now = f"now {bounds[0]:g}, in glow_cifar10_modern 0.5"
        options.append(f"a larger flow.min_scale in a new run ({now})")
    if objective.has_temperature:
        options.append("lower samples.temperatures")
    return ", ".join([*options, "a smaller optim.lr"])


def shown(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """The rows of samples that a picture shows, by label.

    At temperature 0 a flow without classes gives the same image again and again. Such a row is left
    out; if it is the only one, it is cut to one image.
    """
    first = rows.get("T=0")
    if first is None or not (first - first[:1]).abs().amax().item() <= SAME:  # also for nan
        return rows
    others = {label: row for label, row in rows.items() if label != "T=0"}
    return others or {"T=0": first[:1]}


def picture(rows: list[Tensor], n_bits: int, labels: Sequence[str] = ()) -> Tensor:
    """Rows of images in [0, 1], each (N, C, H, W), as one uint8 picture, (3, height, width).

    labels: texts on the left of the rows, one for each; without any there is no margin.

    A pixel gets the value of the lower end of its bin, one of 2^n_bits, as in the code of Glow's
    authors. A pixel with a value that is not finite has the colour NOT_FINITE.
    """
    from torchvision.utils import make_grid

    images = torch.cat(rows).float().cpu()
    if images.shape[1] == 1:
        images = images.expand(-1, 3, -1, -1)
    grid = make_grid(as_levels(images, n_bits), nrow=len(rows[0]), pad_value=255)
    scale = max(1, 64 // images.shape[-1])
    grid = grid.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    if not any(labels):
        return grid
    return torch.cat([margin(labels, grid.shape[1]), grid], 2)


def as_levels(images: Tensor, n_bits: int) -> Tensor:
    """Images in [0, 1] as integers from 0 to 255, (N, C, H, W) uint8.

    A value becomes the lower end of its bin, one of 2^n_bits. A pixel with a value that is not
    finite has the colour NOT_FINITE, or 255 in images that have not three channels.

    >>> as_levels(torch.tensor([0.0, 0.3, 2.0]).view(1, 1, 1, 3), n_bits=2).tolist()
    [[[[0, 64, 255]]]]
    """
    finite = images.isfinite().all(1, keepdim=True)
    images = images.nan_to_num(0.0, 0.0, 0.0)
    levels = ((images * 2**n_bits).floor() * 2 ** (8 - n_bits)).clamp(0, 255).to(torch.uint8)
    colour = NOT_FINITE if images.shape[1] == 3 else (255,)
    return levels.where(finite, levels.new_tensor(colour).view(1, -1, 1, 1))


def margin(labels: Sequence[str], height: int) -> Tensor:
    """A white strip, (3, height, width) uint8, with texts one below the other, evenly spaced.

    Longer texts than LONGEST_LABEL are cut off, and line breaks become spaces.
    """
    from PIL import Image, ImageDraw, ImageFont

    labels = [shortened(" ".join(label.split())) for label in labels]
    row_height = height / len(labels)
    font = ImageFont.load_default(size=max(10, min(24, int(row_height / 3))))
    width = max(math.ceil(font.getlength(label)) for label in labels) + 2 * LABEL_SPACE
    strip = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(strip)
    for i, label in enumerate(labels):
        middle = (LABEL_SPACE, (i + 0.5) * row_height)
        draw.text(middle, label, fill="black", font=font, anchor="lm")
    return torch.from_numpy(np.array(strip)).permute(2, 0, 1)


def shortened(label: str) -> str:
    """A label of at most LONGEST_LABEL characters, which ends with dots if it was longer.

    >>> shortened("a class with a name of many words")
    'a class with a name o...'
    """
    if len(label) <= LONGEST_LABEL:
        return label
    return f"{label[: LONGEST_LABEL - 3]}..."


def caption(name: str, step: int, labels: Sequence[str]) -> str:
    """The text below a picture at W&B. labels: of the rows of samples, from the top.

    >>> caption("samples", 500, ["T=0.7", "T=1"])
    'step 500, samples at T=0.7, T=1 from the top'
    >>> caption("samples", 500, [""])
    'step 500, samples'
    """
    if name == "reconstruction":
        return f"step {step}, validation data above, reconstructions below"
    text = f"step {step}, {name}"
    if any(labels):
        text += f" at {', '.join(labels)}"
    if len(labels) > 1:
        text += " from the top"
    return text


def as_array(image: Tensor) -> np.ndarray:
    """A picture (3, height, width) as PIL takes it, (height, width, 3)."""
    return image.permute(1, 2, 0).numpy()
