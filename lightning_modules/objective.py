"""The contract of an objective: all that callbacks, scripts and results may use of it."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple, Protocol, Self, cast

import lightning.pytorch as L
import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_modules.checks import check_count
from lightning_modules.lightning_internals import datamodule_of
from lightning_modules.metrics import FiniteMean
from lightning_modules.noise import DATA, Position, part_noise
from results.metrics import Metric


class Input(NamedTuple):
    """The input of a model, made from a batch.

    x: (B, *shape), the data that are modelled.
    context: what they are conditioned on, (B, ...), or None.
    log_weight: (B,) nats, what a dequantiser adds to log p(x) (`Dequantizer`); zeros without one.
    noise: (B, *noise_shape), for an estimated log-determinant (`FlowModel.noise_shape`), or None.
    """

    x: Tensor
    context: Tensor | None
    log_weight: Tensor
    noise: Tensor | None = None

    @property
    def arguments(self) -> tuple:
        """The arguments of a flow's methods: x, the context and, if it is not None, the noise."""
        if self.noise is None:
            return self.x, self.context
        return self.x, self.context, self.noise


class Data(Protocol):
    """What objectives and callbacks need from a datamodule, as `StatelessDataModule` explains."""

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

    def unaugmented(self, split: str) -> Dataset: ...

    def initialization_batch(self, n: int) -> list[Tensor]: ...


class Objective(L.LightningModule, ABC):
    """The base class of this repository's LightningModules: one subclass for each objective.

    An objective is what training optimises: a likelihood, super-resolution, denoising and so on. To
    add one, subclass `OptimizedModule`, an `Objective` that updates its weights according to the
    `optim` section of a recipe, and define what is listed here. Callbacks and scripts use nothing
    else of a module. `DensityModule` is an example that defines everything; the one in
    tests/test_objective.py has no flow.

    A subclass has to define:
        metrics         what is measured. The first metric chooses the best checkpoint and is
                        plotted in the learning curve. The subclass logs each metric as
                        `val/<name>` and `test/<name>`, and may log it as `train/<name>`.
        trained         the module whose parameters are optimised, clipped and counted, whose
                        gradients are checked for being finite, and whose parts are compiled or
                        recomputed. (Weight averages and checkpoints contain all parameters of the
                        LightningModule.)
        training_step   updates `train_mean` with the first metric of each datum, (B,), for the
                        training curve, and returns `OptimizedModule.finite_or_nan(loss)`.
        validation_step, test_step
                        log each metric as a mean over data, with one torchmetrics object for each
                        (`image_mean`).
        of              the constructor that a script calls.

    A subclass may define or replace the following. The defaults mean "none":
        shape           the shape of one datum, in which None is any size. If it is (C, H, W), x is
                        an image in [0, 1], and pictures are drawn.
        n_bits          the number of bits of integer data; None for real numbers.
        needs_autograd  whether evaluation computes gradients, so that Lightning's inference mode
                        has to be off.
        model_name, n_parameters
                        the name of the model in messages and results, and how many numbers are
                        trained.
        input_of        makes the input of evaluation from a batch; `benchmarks.stability` uses it.
        has_temperature, draw, reconstruct
                        the pictures that are drawn, and whether samples have a temperature.
        needs_initialization, initialize
                        what is set from a first batch before training, except in a resumed run.
        check_data      refuses data that do not fit the model.
        trial           the loss on made-up data, which is timed to estimate how long a run takes.
        compile_networks, capture
                        how the networks are compiled, and how steps are captured as CUDA graphs.
        constructors    the classes that take the sections of a recipe as keyword arguments.

    A subclass inherits `metric`, `train_mean`, and what is known of the steps that were skipped
    because they were not finite: `skipped` (their number in the whole run), `skipped_last` (whether
    the newest step was one) and `check_skipped()`.

    Batches are (datum, index) or (datum, index, context), as `StatelessDataModule` yields them.
    Noise depends only on where it is used, not on what was drawn before: `training_noise` in
    training, `image_noise` with `noise_seed` in evaluation.

    seed: the seed of the training noise. noise_seed: the seed of the evaluation noise. Raises
    ValueError: one of them is negative.
    """

    metrics: tuple[Metric, ...]
    shape: tuple[int | None, ...] | None = None
    n_bits: int | None = None
    has_temperature: bool = True
    skipped: Tensor  # number of skipped steps in the whole run; int64, a scalar
    skipped_last: Tensor  # whether the newest step was skipped; bool, a scalar

    def __init__(self, seed: int = 0, noise_seed: int = 0) -> None:
        super().__init__()
        check_count("seed", seed)
        check_count("eval.noise_seed", noise_seed)
        self.seed = seed
        self.noise_seed = noise_seed
        self.train_mean = FiniteMean()  # values that are not finite, of skipped steps, do not count
        self.register_buffer("skipped", torch.zeros((), dtype=torch.int64))
        self.register_buffer("skipped_last", torch.zeros((), dtype=torch.bool))

    @classmethod
    @abstractmethod
    def of(cls, config: DictConfig, model: nn.Module, data: Data) -> Self:
        """Make the objective that a recipe describes.

        config: the whole recipe. model: the model that the script has built from `config.flow`.
        data: the datamodule, before its `setup`, which knows `shape`, `n_bits` and `dequantizer`.
        """

    @property
    def metric(self) -> Metric:
        """The metric that chooses the best checkpoint."""
        return self.metrics[0]

    @property
    @abstractmethod
    def trained(self) -> nn.Module:
        """The module whose parameters are trained; a ModuleList if it has several parts."""

    @property
    def needs_autograd(self) -> bool:
        """Whether evaluation computes gradients."""
        return False

    @property
    def model_name(self) -> str:
        """The name of the model in messages."""
        return type(self.trained).__name__

    @property
    def n_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self.trained.parameters())

    @property
    def float_dtype(self) -> torch.dtype:
        """The dtype of the module, without the strings that Lightning's type allows as well."""
        return cast(torch.dtype, self.dtype)

    def constructors(self) -> dict[str, type]:
        """For each section of a recipe, the class that takes its keys as keyword arguments.

        A run is resumed only with the recipe that it began with. If that recipe was saved before a
        key existed, the key counts as the default value of the class.
        """
        return {"optim": type(self), "eval": type(self)}

    # ----------------------------------------------------------------------------- before training

    def check_data(self, data: Data) -> None:
        """Refuse data that do not fit the model.

        Raises ValueError with one line that says which settings to change.
        """

    def needs_initialization(self) -> bool:
        """Whether some parameters still have to be set from data.

        False in a resumed run, whose weights are loaded from a checkpoint.
        """
        return False

    def initialize(self, batch: list[Tensor]) -> None:
        """Set the parameters that depend on data, from a batch that is the same on every rank.

        It is called once, and needs no gradients.
        """

    def trial(self, n: int) -> Tensor | None:
        """The loss on n made-up data, a scalar; None if that would not show how long a step takes.

        A script times it and its backward pass on a copy of the module.
        """
        return None

    def compile_networks(self) -> None:
        """Apply torch.compile to the parts of `trained`. The keys of the state dict stay."""
        trained = self.trained
        parts: list[nn.Module] = [trained]
        if isinstance(trained, nn.ModuleList):
            parts = list(trained)
        for part in parts:
            part.compile()

    def capture(self) -> None:
        """Have training steps replayed as CUDA graphs. Raises ValueError if there are none."""
        raise ValueError(
            f"{type(self).__name__} cannot be captured as CUDA graphs: "
            "give trainer.cuda_graph=false"
        )

    # ----------------------------------------------------------------------------- in training

    def input_of(self, batch: list[Tensor], k: int = 0) -> Input:
        """The input of evaluation, the same at every call. k: the number of the noise sample."""
        datum = batch[0]
        log_weight = datum.new_zeros(len(datum), dtype=self.float_dtype)
        return Input(datum, context_of(batch), log_weight)

    def position(self, batch_idx: int) -> Position:
        """The place in training of micro-batch `batch_idx` of this rank's epoch."""
        n_micro = self.trainer.accumulate_grad_batches
        step, micro = divmod(batch_idx, n_micro)
        part = self.trainer.global_rank * n_micro + micro
        return Position(self.current_epoch, step, part, self.trainer.world_size * n_micro)

    def training_noise(
        self,
        shape: tuple[int, ...],
        position: Position,
        kind: str = "uniform",
        stream: int = DATA,
        device: torch.device | None = None,
    ) -> Tensor:
        """Noise for a micro-batch, of `shape` (b, ...).

        It is a function of the seed, the epoch and the number of the global batch. So a batch of 64
        has the same noise on one rank, on two ranks of 32 each, and accumulated from two
        micro-batches of 32; and a resumed run has the noise of one that was never stopped.

        position: the place of the micro-batch in training.
        kind: "uniform" on [0, 1), or "normal".
        stream: a number other than DATA gives noise that is independent of the data's noise.
        device: the device of the data; None: `self.device`. They differ in the hook `setup`, where
            Lightning already reports the GPU while weights and data are still on the CPU.
        """
        if device is None:
            device = self.device
        noise = part_noise(shape, self.seed, position, device, kind, stream)
        return noise.to(self.float_dtype)

    def check_skipped(self) -> None:
        """Raise `Diverged` if more steps than allowed were skipped because they were not finite."""

    # ----------------------------------------------------------------------------- pictures

    def draw(
        self, n: int, temperature: float, seed: int, batch: list[Tensor] | None = None
    ) -> Tensor | None:
        """Draw n samples, (n, *shape), whose base samples are the same at every temperature.

        None if nothing can be drawn. `draw` and `reconstruct` are called in eval mode and float32.

        batch: validation data, if there are any, with contexts for a model that needs some.
        """
        return None

    def reconstruct(self, batch: list[Tensor]) -> tuple[Tensor, Tensor] | None:
        """Validation data and the model's reconstructions of them, (B, *shape) each.

        A picture shows the data in one row and the reconstructions below. None if there are none.
        """
        return None


def as_objective(module: L.LightningModule) -> Objective:
    """The module of a run, typed as an `Objective`: Lightning's hooks declare a LightningModule."""
    return cast(Objective, module)


def data_of(trainer: L.Trainer) -> Data:
    """The datamodule of a run."""
    return cast(Data, datamodule_of(trainer))


def context_of(batch: list[Tensor]) -> Tensor | None:
    """The third part of a batch, the context of its data; None if there is none."""
    if len(batch) > 2:
        return batch[2]
    return None
