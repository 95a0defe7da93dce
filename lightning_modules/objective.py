"""The contract of an objective: all that callbacks, the glue and the results know of what is trained."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import lightning.pytorch as L
import torch
from torch import Tensor, nn

from lightning_modules.metrics import FiniteMean
from lightning_modules.noise import DATA, Position, part_noise
from results.metrics import Metric


class Input(NamedTuple):
    """What a batch becomes.

    x: (B, *shape), the data that are modelled.
    context: what they are conditioned on, (B, ...), or None.
    log_weight: (B,) nats, what a dequantiser adds to log p(x) (`Dequantizer`); zeros where nothing is dequantised.
    noise: of an estimated log-determinant, (B, *noise_shape), or None.
    """

    x: Tensor
    context: Tensor | None
    log_weight: Tensor
    noise: Tensor | None = None

    @property
    def arguments(self) -> tuple:
        """What a flow's methods take: x, the context and, where there is some, the noise."""
        return (self.x, self.context) if self.noise is None else (self.x, self.context, self.noise)


class Objective(L.LightningModule, ABC):
    """A LightningModule of this house: one a kind of training (likelihood, super-resolution, denoising).

    To add one, subclass `OptimizedModule`, which is an `Objective` that updates weights as a recipe's `optim` section
    says, and write down what follows; `DensityModule` is the example with everything, tests/test_objective.py one
    without a flow. Nothing else of a module may be used by a callback or the glue.

    What it has to set:
        metrics         what is measured; the first one chooses the best weights and is the curve's. Logged in training
                        as `train/<name>` and in evaluation as `val/<name>` and `test/<name>`, by the subclass.
        trained         the module whose parameters are optimised, clipped, checked for what is not finite and counted,
                        and whose parts are compiled or recomputed. (Averages and checkpoints are of all parameters of
                        the LightningModule.)
        training_step   updates `train_mean` with the first metric of each datum, (B,), which is what the curve shows
                        of training; returns `OptimizedModule.finite_or_nan` of the loss.
        validation_step, test_step
                        log the metrics as means over data: torchmetrics objects (`image_mean`), one a metric.
        of              the constructor that a script calls.

    What it may set, or replace; as it stands, each means that there is none:
        shape           of one datum; entries may be None, any size. Where it is (C, H, W), x is an image in [0, 1] and
                        pictures are drawn.
        n_bits          of the data's integers; None for real numbers.
        needs_autograd  whether evaluation takes gradients: then Lightning's inference mode is off.
        model_name, n_parameters
                        what messages and results call the model, and how many numbers are trained.
        input_of        how a batch becomes what evaluation sees; `benchmarks.stability` asks for it.
        has_temperature, draw, reconstruct
                        what is drawn for pictures, and whether samples have a temperature.
        needs_initialization, initialize
                        what is set from a first batch, before training and never when a run goes on.
        check_data      whether the data are those that the model is for.
        trial           a loss of made-up data, by which a run's duration is told.
        compile_networks, capture
                        how its networks are compiled and its steps captured as CUDA graphs.
        constructors    what the sections of a recipe are the arguments of, where a run goes on.

    What it has without doing anything: `metric`, `train_mean`, and the counts of steps that were left out since they
    were not finite, `skipped` (in the whole run), `skipped_last` (whether the newest was) and `check_skipped()`.

    Batches are (datum, index) or (datum, index, context), as `StatelessDataModule` gives them. Noise is a function of
    where it is used: `training_noise` in training, `image_noise` with `noise_seed` in evaluation.

    seed: of the training noise. noise_seed: of the evaluation noise.
    """

    metrics: tuple[Metric, ...]
    shape: tuple[int, ...] | None = None
    n_bits: int | None = None
    needs_autograd = False
    has_temperature = True

    def __init__(self, seed: int = 0, noise_seed: int = 0) -> None:
        super().__init__()
        self.seed, self.noise_seed = seed, noise_seed
        self.train_mean = FiniteMean()  # a step that is skipped does not count
        self.register_buffer(
            "skipped", torch.zeros((), dtype=torch.int64)
        )  # steps, in the whole run
        self.register_buffer(
            "skipped_last", torch.zeros((), dtype=torch.bool)
        )  # whether the newest step was

    @classmethod
    @abstractmethod
    def of(cls, config, model: nn.Module, data: L.LightningDataModule) -> "Objective":
        """The objective that a recipe describes. config: the whole one; model: what the script made of `config.flow`.

        data: not yet set up; their `shape`, `n_bits` and `dequantizer` are known.
        """

    @property
    def metric(self) -> Metric:
        """The metric that chooses the best weights."""
        return self.metrics[0]

    @property
    @abstractmethod
    def trained(self) -> nn.Module:
        """The module whose parameters are trained; where there are several parts, a ModuleList of them."""

    @property
    def model_name(self) -> str:
        """What a message calls the model."""
        return type(self.trained).__name__

    @property
    def n_parameters(self) -> int:
        """Numbers that are trained."""
        return sum(parameter.numel() for parameter in self.trained.parameters())

    def constructors(self) -> dict[str, type]:
        """Section of a recipe -> the class whose keyword arguments its keys are.

        Where a run goes on, a key that its recipe did not have at first counts as the constructor's default.
        """
        return {"optim": type(self), "eval": type(self)}

    # ------------------------------------------------------------------------------------------ before training

    def check_data(self, data: L.LightningDataModule) -> None:
        """ValueError, one line that says what to give: these data are not those that the model is for."""

    def needs_initialization(self) -> bool:
        """Whether something is still to be set from data; False where a run goes on, whose weights are loaded."""
        return False

    def initialize(self, batch: list[Tensor]) -> None:
        """Set it, from a batch that is equal on every rank; called once, without gradients wanted."""

    def trial(self, n: int) -> Tensor | None:
        """The loss of n made-up data, for a measurement of time on a copy; None where that says nothing."""
        return None

    def compile_networks(self) -> None:
        """torch.compile what is trained. Keys of the state dict stay."""
        parts = self.trained if isinstance(self.trained, nn.ModuleList) else [self.trained]
        for part in parts:
            part.compile()

    def capture(self) -> None:
        """Have training steps replayed as CUDA graphs. ValueError, one line: that is not to be had."""
        raise ValueError(
            f"{type(self).__name__} captures no CUDA graphs: give trainer.cuda_graph=false"
        )

    # ------------------------------------------------------------------------------------------ in training

    def input_of(self, batch: list[Tensor], k: int = 0) -> Input:
        """A batch as evaluation sees it, the same whenever it is asked for. k: number of the noise sample."""
        datum, context = batch[0], context_of(batch)
        return Input(datum, context, datum.new_zeros(len(datum), dtype=self.dtype))

    def position(self, batch_idx: int) -> Position:
        """Where the micro-batch stands that `training_step` has been handed."""
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
        """Noise of a micro-batch, `shape` = (b, ...): a function of seed, epoch and number of the global batch.

        So that 1 x 64 = 2 x 32 data = accumulated, and a run that goes on has the noise that it would have had.
        kind: "uniform" on [0, 1) or "normal". stream: another number for noise that is independent of the first.
        device: where the data are, if that is not the module's device. In the hook `setup` the module's device is
        already the GPU, but the weights are still on the CPU.
        """
        device = self.device if device is None else device
        return part_noise(shape, self.seed, at, device, kind, stream).to(self.dtype)

    def check_skipped(self) -> None:
        """`Diverged` where more steps than are allowed were not finite, and therefore skipped."""

    # ------------------------------------------------------------------------------------------ pictures

    def draw(
        self, n: int, temperature: float, seed: int, batch: list[Tensor] | None = None
    ) -> Tensor | None:
        """n samples, (n, *shape), of the same base sample at every temperature; None where nothing can be drawn.

        Called in eval mode, in float32, as is `reconstruct`. batch: of validation data, where there are some, for a
        context that cannot be made up.
        """
        return None

    def reconstruct(self, batch: list[Tensor]) -> tuple[Tensor, Tensor] | None:
        """Validation data and what the model makes of them, (B, *shape) each, to be seen one above the other."""
        return None


def context_of(batch: list[Tensor]) -> Tensor | None:
    """What the data of a batch are conditioned on, its third part; None where it has none."""
    return batch[2] if len(batch) > 2 else None
