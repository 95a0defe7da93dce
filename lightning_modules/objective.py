"""The contract of an objective: all that callbacks, scripts and results know of what is trained."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple, Protocol, Self, cast

import lightning.pytorch as L
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from lightning_modules.checks import check_count
from lightning_modules.lightning_internals import datamodule_of
from lightning_modules.metrics import FiniteMean
from lightning_modules.noise import DATA, Position, part_noise
from results.metrics import Metric


class Input(NamedTuple):
    """What a batch becomes.

    x: (B, *shape), the data that are modelled.
    context: what they are conditioned on, (B, ...), or None.
    log_weight: (B,) nats, what a dequantiser adds to log p(x) (`Dequantizer`); zeros where nothing
        is dequantised.
    noise: of an estimated log-determinant, (B, *noise_shape), or None.
    """

    x: Tensor
    context: Tensor | None
    log_weight: Tensor
    noise: Tensor | None = None

    @property
    def arguments(self) -> tuple:
        """What a flow's methods take: x, the context and, if it is not None, the noise."""
        if self.noise is None:
            return self.x, self.context
        return self.x, self.context, self.noise


class Data(Protocol):
    """What an objective and the callbacks ask of a datamodule; see `StatelessDataModule`."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def n_bits(self) -> int | None: ...

    @property
    def dequantizer(self) -> nn.Module | None: ...

    @property
    def labels(self) -> bool: ...

    @property
    def n_classes(self) -> int | None: ...

    def train_batches(self, n: int) -> Iterator[list[Tensor]]: ...

    def initialization_batch(self, n: int) -> list[Tensor]: ...


class Objective(L.LightningModule, ABC):
    """A LightningModule of this repository: one for each kind of training.

    Kinds are likelihood, super-resolution, denoising and so on. To add one, subclass
    `OptimizedModule`, which is an `Objective` that updates weights as a recipe's `optim` section
    says, and define what is listed here. `DensityModule` is the example that has everything;
    tests/test_objective.py has one without a flow. A callback or a script may use nothing else of a
    module.

    A subclass has to define:
        metrics         what is measured. The first one chooses the best weights and is shown by the
                        curve. The subclass logs them, in training as `train/<name>` and in
                        evaluation as `val/<name>` and `test/<name>`.
        trained         the module whose parameters are optimised, clipped, counted, and checked for
                        being finite, and whose parts are compiled or recomputed. (Averages and
                        checkpoints are of all parameters of the LightningModule.)
        training_step   updates `train_mean` with the first metric of each datum, (B,), which the
                        curve shows for training; returns `OptimizedModule.finite_or_nan` of the
                        loss.
        validation_step, test_step
                        log the metrics as means over data: torchmetrics objects (`image_mean`), one
                        for each metric.
        of              the constructor that a script calls.

    A subclass may define or replace the following. The defaults mean "none":
        shape           of one datum; None among its entries is any size. Where it is (C, H, W), x
                        is an image in [0, 1] and pictures are drawn.
        n_bits          of the data's integers; None for real numbers.
        needs_autograd  whether evaluation takes gradients: then Lightning's inference mode is off.
        model_name, n_parameters
                        what messages and results call the model, and how many numbers are trained.
        input_of        how a batch becomes what evaluation sees; `benchmarks.stability` calls it.
        has_temperature, draw, reconstruct
                        what is drawn for pictures, and whether samples have a temperature.
        needs_initialization, initialize
                        what is set from a first batch, before training; not where a run goes on.
        check_data      whether the data are those that the model is for.
        trial           a loss of made-up data, by which the duration of a run is estimated.
        compile_networks, capture
                        how its networks are compiled and its steps captured as CUDA graphs.
        constructors    the classes whose arguments the sections of a recipe are; a run that goes
                        on is compared with its first part by them.

    A subclass inherits `metric`, `train_mean`, and the counts of steps that were skipped because
    they were not finite: `skipped` (in the whole run), `skipped_last` (whether the newest was) and
    `check_skipped()`.

    Batches are (datum, index) or (datum, index, context), as `StatelessDataModule` gives them.
    Noise is a function of the place where it is used: `training_noise` in training, `image_noise`
    with `noise_seed` in evaluation.

    seed: of the training noise. noise_seed: of the evaluation noise. ValueError, one line: one of
    them is negative.
    """

    metrics: tuple[Metric, ...]
    shape: tuple[int | None, ...] | None = None
    n_bits: int | None = None
    has_temperature: bool = True
    skipped: Tensor  # steps that were not finite, in the whole run; int64, a scalar
    skipped_last: Tensor  # whether the newest step was not finite; bool, a scalar

    def __init__(self, seed: int = 0, noise_seed: int = 0) -> None:
        super().__init__()
        check_count("seed", seed)
        check_count("eval.noise_seed", noise_seed)
        self.seed = seed
        self.noise_seed = noise_seed
        self.train_mean = FiniteMean()  # steps that are skipped do not count
        self.register_buffer("skipped", torch.zeros((), dtype=torch.int64))
        self.register_buffer("skipped_last", torch.zeros((), dtype=torch.bool))

    @classmethod
    @abstractmethod
    def of(cls, config: DictConfig, model: nn.Module, data: Data) -> Self:
        """The objective that a recipe describes.

        config: the whole recipe. model: what the script made of `config.flow`. data: not yet set
        up; their `shape`, `n_bits` and `dequantizer` are known.
        """

    @property
    def metric(self) -> Metric:
        """The metric that chooses the best weights."""
        return self.metrics[0]

    @property
    @abstractmethod
    def trained(self) -> nn.Module:
        """The module whose parameters are trained; a ModuleList where there are several parts."""

    @property
    def needs_autograd(self) -> bool:
        """Whether evaluation takes gradients."""
        return False

    @property
    def model_name(self) -> str:
        """What a message calls the model."""
        return type(self.trained).__name__

    @property
    def n_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self.trained.parameters())

    @property
    def float_dtype(self) -> torch.dtype:
        """The dtype of the module. Lightning declares that it may be a string, which it is not."""
        return cast(torch.dtype, self.dtype)

    def constructors(self) -> dict[str, type]:
        """For each section of a recipe the class whose keyword arguments its keys are.

        Where a run goes on, a key that its recipe did not have at first counts as the default of
        the constructor.
        """
        return {"optim": type(self), "eval": type(self)}

    # ----------------------------------------------------------------------------- before training

    def check_data(self, data: Data) -> None:
        """Refuse data that the model is not for. ValueError, one line that says what to give."""

    def needs_initialization(self) -> bool:
        """Whether something has still to be set from data.

        False where a run goes on, since its weights are loaded.
        """
        return False

    def initialize(self, batch: list[Tensor]) -> None:
        """Set what depends on data from a batch that is equal on every rank.

        It is called once, and needs no gradients.
        """

    def trial(self, n: int) -> Tensor | None:
        """The loss of n made-up data, a scalar, to measure the time of a step on a copy.

        None where that would say nothing.
        """
        return None

    def compile_networks(self) -> None:
        """Compile with torch.compile what is trained. Keys of the state dict stay."""
        trained = self.trained
        parts: list[nn.Module] = [trained]
        if isinstance(trained, nn.ModuleList):
            parts = list(trained)
        for part in parts:
            part.compile()

    def capture(self) -> None:
        """Have training steps replayed as CUDA graphs. ValueError, one line: it cannot be done."""
        raise ValueError(
            f"{type(self).__name__} captures no CUDA graphs: give trainer.cuda_graph=false"
        )

    # ----------------------------------------------------------------------------- in training

    def input_of(self, batch: list[Tensor], k: int = 0) -> Input:
        """A batch as evaluation sees it, the same at every call. k: number of the noise sample."""
        datum = batch[0]
        log_weight = datum.new_zeros(len(datum), dtype=self.float_dtype)
        return Input(datum, context_of(batch), log_weight)

    def position(self, batch_idx: int) -> Position:
        """The place in training of the micro-batch that `training_step` has been handed."""
        n_micro = self.trainer.accumulate_grad_batches
        step, micro = divmod(batch_idx, n_micro)
        part = self.trainer.global_rank * n_micro + micro
        return Position(self.current_epoch, step, part, self.trainer.world_size * n_micro)

    def training_noise(
        self,
        shape: tuple[int, ...],
        at: Position,
        kind: str = "uniform",
        stream: int = DATA,
        device: torch.device | None = None,
    ) -> Tensor:
        """Noise of a micro-batch, `shape` = (b, ...).

        It is a function of seed, epoch and the number of the global batch. So batches of 64, of
        2 x 32 on two ranks and of 2 x 32 accumulated have the same noise, and so has a run that
        goes on.

        kind: "uniform" on [0, 1) or "normal". stream: another number than DATA for noise that is
        independent of that of the data. device: where the data are, if that is not the module's
        device. In the hook `setup` Lightning already calls the GPU the module's device, but the
        weights are still on the CPU.
        """
        if device is None:
            device = self.device
        noise = part_noise(shape, self.seed, at, device, kind, stream)
        return noise.to(self.float_dtype)

    def check_skipped(self) -> None:
        """Raise `Diverged` where more steps than are allowed were skipped as not finite."""

    # ----------------------------------------------------------------------------- pictures

    def draw(
        self, n: int, temperature: float, seed: int, batch: list[Tensor] | None = None
    ) -> Tensor | None:
        """n samples, (n, *shape), of the same base sample at every temperature.

        None where nothing can be drawn. It is called in eval mode and in float32, and so is
        `reconstruct`.

        batch: of validation data, if there are any, for a context that cannot be made up.
        """
        return None

    def reconstruct(self, batch: list[Tensor]) -> tuple[Tensor, Tensor] | None:
        """Validation data and what the model makes of them, (B, *shape) each.

        A picture shows one above the other. None where there is nothing to show.
        """
        return None


def as_objective(module: L.LightningModule) -> Objective:
    """The module of a run: Lightning's hooks declare any module, and here it is an objective."""
    return cast(Objective, module)


def data_of(trainer: L.Trainer) -> Data:
    """The datamodule of a run."""
    return cast(Data, datamodule_of(trainer))


def context_of(batch: list[Tensor]) -> Tensor | None:
    """The third part of a batch, on which its data are conditioned; None where it has none."""
    if len(batch) > 2:
        return batch[2]
    return None
