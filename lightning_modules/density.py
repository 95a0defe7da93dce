"""Maximum likelihood: the objective of every flow that models p(x) or p(x | context)."""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, Self, TypeVar, cast

import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities import rank_zero_info
from omegaconf import DictConfig
from torch import Tensor, nn
from torchmetrics import MeanMetric

from flows.base import FlowModel, UninitializedWarning
from flows.likelihood import bits_per_dim
from flows.normalization import uninitialized
from lightning_modules.batch_norm import has_batch_norm, reestimated
from lightning_modules.checks import check_count, check_not_negative
from lightning_modules.cuda_graph import CudaGraph
from lightning_modules.lightning_internals import callbacks_of
from lightning_modules.metrics import image_mean
from lightning_modules.noise import FLOW, Dequantization, Position, evaluation_input, image_noise
from lightning_modules.objective import Data, Input, context_of, data_of
from lightning_modules.optimization import OptimizedModule, OptimizerName, ScheduleName
from lightning_modules.precision import evaluation
from results.metrics import Metric

MOST_SAMPLES = 100_000  # of the dequantisation noise of an image, in evaluation
REESTIMATED = "_reestimated"  # suffix of metrics measured with re-estimated batch-norm statistics
T = TypeVar("T")


class Penalized(Protocol):
    """A flow that has a penalty on its weights, a scalar."""

    def l2_penalty(self) -> Tensor: ...


class DensityModule(OptimizedModule):
    """Minimises the mean of -log p(x) in nats per datum, plus l2 * flow.l2_penalty() where l2 > 0.

    With n_bits (images) it logs `train/bpd`, `val/bpd` and `test/bpd` in bits/dim; without (points)
    `train/nll` and so on, in nats. The name of the metric says what kind of figure it is:
    `bpd_bound` with a learned dequantiser, whose log_weight is added to log p(x), in training too;
    `bpd_noisy` with a dequantiser whose noise leaves the bin; `bpd_estimate` with a flow whose
    log-determinant is an estimate. Evaluation runs in float32.

    A flow with batch norm is tested twice in one pass: `test/bpd` uses its running statistics, and
    `test/bpd_reestimated` uses statistics estimated anew on `bn_images` training images. Averaged
    weights (EMA) have no running statistics of their own, so with them every evaluation uses
    re-estimated statistics, without the suffix.

    To add a term to the likelihood, a subclass replaces `objective`, `evaluate` and
    `extra_metrics`.

    flow: the model.
    dequantizer: a `Dequantizer`, whose parameters, if any, are trained with the flow's; None for
        real numbers.
    n_bits: the number of bits of integer data; None for real numbers.
    seed, noise_seed: the seeds of the training noise and of the evaluation noise.
    l2: the weight of `flow.l2_penalty()`.
    bn_images: see above; 0: statistics are never re-estimated.
    noise_samples: k; if k > 1, evaluation adds the importance-weighted bound of k noise samples per
        image, `bpd_iw<k>`: log 1/k sum_i p(x_i) exp(log_weight_i) (Burda et al. 2016). `bpd` stays
        the value of the first sample.
    shape: the shape of one datum; None: the flow's.
    The other arguments are those of `OptimizedModule`. Raises ValueError: one of them is out of
    its range, or does not fit the others.
    """

    extra_metrics: tuple[Metric, ...] = ()  # what `evaluate` measures besides the likelihood
    flow: FlowModel
    dequantizer: nn.Module | None
    shape: tuple[int | None, ...]

    def __init__(
        self,
        flow: FlowModel,
        dequantizer: nn.Module | None,
        n_bits: int | None,
        seed: int,
        name: OptimizerName = "adam",
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        l2: float = 0.0,
        warmup_steps: int = 0,
        schedule: ScheduleName = "constant",
        cooldown_steps: int = 0,
        clip_norm: float | None = None,
        max_skipped: int = 20,
        noise_seed: int = 0,
        bn_images: int = 10_000,
        noise_samples: int = 1,
        shape: tuple[int, ...] | None = None,
        milestones: Sequence[float] = (0.5, 0.75, 0.9, 0.95),
        gamma: float = 0.5,
    ) -> None:
        super().__init__(
            name=name,
            lr=lr,
            betas=betas,
            weight_decay=weight_decay,
            warmup_steps=warmup_steps,
            schedule=schedule,
            cooldown_steps=cooldown_steps,
            clip_norm=clip_norm,
            max_skipped=max_skipped,
            seed=seed,
            noise_seed=noise_seed,
            milestones=milestones,
            gamma=gamma,
        )
        check_not_negative("optim.l2", l2)
        if l2 and not hasattr(flow, "l2_penalty"):
            raise ValueError(f"optim.l2={l2}: {type(flow).__name__} has no L2 penalty: give 0")
        check_count("eval.bn_images", bn_images)
        check_count("eval.noise_samples", noise_samples, least=1, most=MOST_SAMPLES)
        if dequantizer is not None and has_batch_norm(dequantizer):
            raise ValueError(
                f"{type(dequantizer).__name__} has batch norms, "
                "whose statistics would not be re-estimated: use another normalisation"
            )
        self.flow = flow
        self.dequantizer = dequantizer
        self.n_bits = n_bits
        self.shape = tuple(flow.shape if shape is None else shape)
        self.l2 = l2
        self.bn_images = bn_images
        self.noise_samples = noise_samples
        self.cuda_graph: CudaGraph | None = None  # replays training steps; set by `capture`
        self.metrics = (*self._likelihoods(), *self.extra_metrics)
        self.eval_means = nn.ModuleDict()
        for metric in self.metrics:
            for suffix in ("", REESTIMATED):
                self.eval_means[f"{metric.name}{suffix}"] = image_mean()
        self._evaluated: dict[str, FlowModel] = {}  # suffix of the metrics -> flow

    @classmethod
    def of(
        cls,
        config: DictConfig,
        model: nn.Module,
        data: Data,
        dequantizer: nn.Module | None = None,
    ) -> Self:
        """Make the module that a recipe describes.

        config: the whole recipe. model: a `FlowModel`. data: the datamodule, before its `setup`.
        dequantizer: replaces the dequantiser of the data.
        """
        if dequantizer is None:
            dequantizer = data.dequantizer
        settings = {**config.optim, **config.eval}
        flow = cast(FlowModel, model)
        return cls(flow, dequantizer, data.n_bits, config.seed, shape=data.shape, **settings)

    def _likelihoods(self) -> list[Metric]:
        """The metric of one noise sample and, if several are drawn, the bound of all of them.

        Raises ValueError: several samples would not give a tighter bound.
        """
        kind = "exact" if self.dequantizer is None else self._dequantization.kind
        if self.flow.noise_shape is not None:
            kind = "estimate" if kind == "exact" else f"{kind}_estimate"
        quantity = "bpd"
        unit = "bits/dim"
        if self.n_bits is None:
            quantity = "nll"
            unit = "nats"
        single = Metric(quantity, "lower", unit, kind)
        k = self.noise_samples
        if k == 1:
            return [single]
        reason = None
        if self.dequantizer is None:
            reason = "no noise is drawn"
        elif self.flow.noise_shape is not None or kind.startswith("noisy"):
            reason = f"{single.name} is not a bound, so more samples would not tighten it"
        if reason is not None:
            raise ValueError(f"eval.noise_samples={k}, but {reason}: give 1")
        return [single, Metric(quantity, "lower", unit, "iw", k)]

    # ----------------------------------------------------------------------------- declarations

    @property
    def trained(self) -> nn.Module:
        """The flow; if the dequantiser has parameters, the flow and the dequantiser."""
        if self.dequantizer is None or next(self.dequantizer.parameters(), None) is None:
            return self.flow
        return nn.ModuleList([self.flow, self.dequantizer])

    @property
    def model_name(self) -> str:
        return type(self.flow).__name__

    @property
    def needs_autograd(self) -> bool:
        return self.flow.needs_autograd

    def constructors(self) -> dict[str, type]:
        return {**super().constructors(), "flow": type(self.flow)}

    @property
    def _dequantization(self) -> Dequantization:
        """The dequantiser, typed for data that have one."""
        return cast(Dequantization, self.dequantizer)

    @property
    def _noise_shape(self) -> tuple[int, ...]:
        """The shape of one datum's noise, for a flow whose log-determinant is an estimate."""
        return cast(tuple[int, ...], self.flow.noise_shape)

    def check_data(self, data: Data) -> None:
        """Refuse data without the classes that the flow is conditioned on. Raises ValueError.

        The flow itself checks other kinds of context, in the first batch.
        """
        n_classes = self.flow.n_classes
        if n_classes is None:
            return
        if not data.labels:
            raise ValueError(
                f"flow.n_classes={n_classes} needs classes: "
                "give data.labels=true, where the data have them"
            )
        if n_classes != data.n_classes:
            raise ValueError(
                f"flow.n_classes={n_classes}, but {type(data).__name__} has {data.n_classes}: "
                f"give flow.n_classes={data.n_classes}"
            )

    def needs_initialization(self) -> bool:
        parts = [self.flow, self.dequantizer]
        return any(uninitialized(part) for part in parts if part is not None)

    @torch.no_grad()
    def initialize(self, batch: list[Tensor]) -> None:
        """Set the ActNorms of the dequantiser and then those of the flow, in float32.

        The batch is dequantised with the noise of the first training step.
        """
        first = Position(epoch=0, step=0)
        with evaluation(self.device.type):
            if self.dequantizer is not None:
                noise = self._dequantization_noise(batch[0], first)
                self._dequantization.initialize(batch[0], noise, self.context(batch))
            x, context, *_ = self.training_input(batch, first)
            self.flow.initialize(x, context)

    def trial(self, n: int) -> Tensor | None:
        """The loss on n random images; None for points, and if no context can be made up."""
        if len(self.shape) != 3 or None in self.shape:
            return None
        datum = torch.rand(n, *cast(tuple[int, ...], self.shape))
        if self.dequantizer is not None and self.n_bits is not None:
            datum = (datum * 2**self.n_bits).to(torch.uint8)
        batch = [datum, torch.arange(n)]
        if self.flow.conditioned_on is not None:
            context = self.flow.conditioned_on.examples(n, torch.device("cpu"))
            if context is None:
                return None
            batch.append(context)
        sample = self.training_input(batch, Position(epoch=0, step=0))
        with warnings.catch_warnings():  # a trial comes before the initialisation
            warnings.simplefilter("ignore", UninitializedWarning)
            return -(self.flow.log_prob(*sample.arguments) + sample.log_weight).mean()

    def capture(self) -> None:
        """Capture the forward and backward pass of the flow; dequantisation stays outside."""
        self.cuda_graph = CudaGraph(self.flow)

    def draw(
        self, n: int, temperature: float, seed: int, batch: list[Tensor] | None = None
    ) -> Tensor | None:
        """Draw n samples, (n, *shape); without a fixed size, of the size of the validation data.

        None if the size or the context is missing.
        """
        context = None if batch is None else self.context(batch)
        shape = self.shape
        if None in shape:
            if batch is None:
                return None
            shape = tuple(batch[0].shape[1:])
        sizes = cast(tuple[int, ...], shape)
        with self._gradients():
            samples = draw_samples(self.flow, n, temperature, seed, sizes, context)
        return None if samples is None else samples.detach()

    def reconstruct(self, batch: list[Tensor]) -> tuple[Tensor, Tensor] | None:
        """x and f^-1(f(x)), (B, *shape) each; None for data that are not dequantised."""
        if self.dequantizer is None:
            return None
        with self._gradients():
            x, *rest = self.input_of(batch).arguments
            latents, _ = self.flow(x, *rest)
            reconstruction, _ = self.flow.inverse(latents, *rest)
        return x.detach(), reconstruction.detach()

    # ----------------------------------------------------------------------------- inputs

    def context(self, batch: list[Tensor]) -> Tensor | None:
        """The context of a batch; None if the flow is not conditioned on anything."""
        if self.flow.conditioned_on is None:
            return None
        return context_of(batch)

    def training_input(self, batch: list[Tensor], position: Position) -> Input:
        """The input made from a micro-batch, with the noise of its place in training."""
        q = batch[0]
        context = self.context(batch)
        noise = None
        if self.flow.noise_shape is not None:
            shape = (len(q), *self.flow.noise_shape)
            noise = self.training_noise(shape, position, stream=FLOW, device=q.device)
        if self.dequantizer is None:
            return Input(q, context, torch.zeros(len(q), device=q.device, dtype=q.dtype), noise)
        dequantization_noise = self._dequantization_noise(q, position)
        x, log_weight = self._dequantization(q, dequantization_noise, context)
        return Input(x, context, log_weight, noise)

    def input_of(self, batch: list[Tensor], k: int = 0) -> Input:
        """The input made from a batch, where a datum's noise depends on (noise_seed, index, k)."""
        q, indices, *_ = batch
        context = self.context(batch)
        noise = None
        if self.flow.noise_shape is not None:
            noise = self._estimation_noise(indices, k, q.device)
        if self.dequantizer is None:
            return Input(q, context, torch.zeros(len(q), device=q.device, dtype=q.dtype), noise)
        x, log_weight = evaluation_input(
            self._dequantization, q, indices, self.noise_seed, self.float_dtype, k, context
        )
        return Input(x, context, log_weight, noise)

    def _estimation_noise(self, indices: Tensor, k: int, device: torch.device) -> Tensor:
        noise = image_noise(indices, self._noise_shape, self.noise_seed, k, stream=FLOW)
        return noise.to(device, self.float_dtype)

    def _dequantization_noise(self, q: Tensor, position: Position) -> Tensor:
        kind = self._dequantization.noise
        return self.training_noise(tuple(q.shape), position, kind, device=q.device)

    # ----------------------------------------------------------------------------- training

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        sample = self.training_input(batch, self.position(batch_idx))
        log_prob, penalty = self.objective(*sample.arguments)
        integrand = log_prob + sample.log_weight
        loss = penalty - integrand.mean()
        per_datum = self.loss_per_datum(integrand.detach(), sample.x[0].numel())
        self.train_mean.update(per_datum)
        # The progress bar shows the mean on this rank; the curve shows the mean over all ranks.
        self.log(f"train/{self.metric.name}", per_datum.mean(), prog_bar=True)
        if self.l2:
            loss = loss + self.l2 * cast(Penalized, self.flow).l2_penalty()
        return self.finite_or_nan(loss)

    def objective(
        self, x: Tensor, context: Tensor | None = None, *noise: Tensor
    ) -> tuple[Tensor, Tensor | float]:
        """log p(x | context), (B,) nats, and a scalar penalty that is added to the loss.

        A subclass has to call the flow through `run`, which may replay a CUDA graph.
        """
        return self.run(self.flow.log_prob, x, context, *noise), 0.0

    def run(self, method: Callable[..., T], *inputs: Tensor | None) -> T:
        """Call method(*inputs) of the flow, as a CUDA graph if `capture` was called."""
        if self.cuda_graph is None:
            return method(*inputs)
        return self.cuda_graph(method, *inputs)

    def loss_per_datum(self, log_prob: Tensor, n_dims: int | None = None) -> Tensor:
        """The values, (B,), logged for log p(x), (B,) nats: bits/dim for images, nats for points.

        n_dims: the number of dimensions of a datum; None: computed from `shape`.
        """
        if self.n_bits is None:
            return -log_prob
        if n_dims is None:
            n_dims = math.prod(cast(tuple[int, ...], self.shape))
        return bits_per_dim(log_prob, n_dims, self.n_bits)

    # ----------------------------------------------------------------------------- evaluation

    def evaluate(
        self, flow: FlowModel, x: Tensor, context: Tensor | None = None, *noise: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """log p(x | context) under `flow`, (B,) nats, and name -> values, (B,), of `extra_metrics`.

        flow: this module's flow, or a copy with re-estimated batch-norm statistics.
        """
        return flow.log_prob(x, context, *noise), {}

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """log p(x | context), (B,) nats, of data that need no dequantisation.

        Batch norms use their running statistics. An estimated log-determinant uses the noise of
        data with indices 0 .. B - 1.
        """
        noise: list[Tensor] = []
        if self.flow.noise_shape is not None:
            noise.append(self._estimation_noise(torch.arange(len(x)), 0, x.device))
        with evaluation(self.device.type), self._gradients():
            return self.flow.log_prob(x, context, *noise).detach()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        self._measure(batch, "val")

    def test_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        self._measure(batch, "test")

    def on_validation_epoch_start(self) -> None:
        self._prepare_evaluation(testing=False)

    def on_test_epoch_start(self) -> None:
        self._prepare_evaluation(testing=True)

    def _measure(self, batch: list[Tensor], split: str) -> None:
        """Update and log every metric with a batch, for each of the evaluated flows."""
        integrands: dict[str, list[Tensor]] = {suffix: [] for suffix in self._evaluated}
        with evaluation(self.device.type), self._gradients():
            for k in range(self.noise_samples):
                sample = self.input_of(batch, k)
                n_dims = sample.x[0].numel()
                for suffix, flow in self._evaluated.items():
                    log_prob, measures = self.evaluate(flow, *sample.arguments)
                    integrands[suffix].append((log_prob + sample.log_weight).detach())
                    if k == 0:
                        first = self.loss_per_datum(integrands[suffix][0], n_dims)
                        self._log(split, suffix, {self.metric.name: first, **measures})
        if self.noise_samples > 1:
            name = self.metrics[1].name
            for suffix, samples in integrands.items():
                self._log(split, suffix, {name: self.loss_per_datum(log_mean_exp(samples), n_dims)})

    def _log(self, split: str, suffix: str, measures: dict[str, Tensor]) -> None:
        """Log means over all data of an evaluation. measures: name -> values of a batch, (B,)."""
        for name, values in measures.items():
            mean = cast(MeanMetric, self.eval_means[f"{name}{suffix}"])
            mean.update(values.detach())
            in_bar = name == self.metric.name and not suffix
            self.log(f"{split}/{name}{suffix}", mean, on_step=False, on_epoch=True, prog_bar=in_bar)

    @contextlib.contextmanager
    def _gradients(self) -> Iterator[None]:
        """Enable gradients in the block if evaluation needs them, and else disable them."""
        with torch.set_grad_enabled(self.needs_autograd):
            yield

    def _prepare_evaluation(self, testing: bool) -> None:
        """Choose the flows to evaluate, and re-estimate batch-norm statistics where needed.

        The flow's own statistics are used in validation, both kinds in a test, and for averaged
        weights only re-estimated ones.
        """
        self._evaluated = {"": self.flow}
        averaged = any(isinstance(c, WeightAveraging) for c in callbacks_of(self.trainer))
        reestimates = self.bn_images > 0 and (testing or averaged)
        if not reestimates or self.trainer.sanity_checking or not has_batch_norm(self.flow):
            return
        if testing:  # it can take a minute, in which nothing else is shown
            rank_zero_info(f"estimating batch-norm statistics on {self.bn_images:,} images")
        with evaluation(self.device.type), self._gradients():
            batches = enumerate(data_of(self.trainer).train_batches(self.bn_images))
            inputs = (
                self._reestimation_input(batch, number).arguments for number, batch in batches
            )
            reestimated_flow = reestimated(self.flow, inputs)
        self._evaluated = {"": self.flow, REESTIMATED: reestimated_flow}
        if averaged:
            self._evaluated = {"": reestimated_flow}

    def _reestimation_input(self, batch: list[Tensor], number: int) -> Input:
        """The input made from batch `number` of the first epoch, with its training noise."""
        position = Position(0, number, self.trainer.global_rank, self.trainer.world_size)
        return self.training_input([part.to(self.device) for part in batch], position)


def log_mean_exp(samples: list[Tensor]) -> Tensor:
    """ln(mean of exp(sample)) over the samples, (B,) each; computed in float64, (B,).

    >>> log_mean_exp([torch.tensor([0.0]), torch.tensor([0.0])]).tolist()
    [0.0]
    """
    return torch.stack(samples).double().logsumexp(0) - math.log(len(samples))


def draw_samples(
    flow: FlowModel,
    n: int,
    temperature: float,
    seed: int,
    shape: tuple[int, ...] | None = None,
    context: Tensor | None = None,
) -> Tensor | None:
    """Draw n samples, (n, *shape), whose base samples are the same at every temperature.

    Classes, for a class-conditional flow, are taken in turn. A flow whose contexts cannot be made
    up takes the rows of `context`, (B, ...), in turn. None if it has none.

    shape: the shape of a sample, for a flow of data of any size.
    """
    generator = torch.Generator().manual_seed(seed)
    context_sets_shape = type(flow).sample_shape is not FlowModel.sample_shape
    if context_sets_shape or None not in flow.shape:
        shape = None
    if flow.conditioned_on is None:
        return flow.sample(n, temperature, shape=shape, generator=generator)
    device = next(flow.parameters()).device
    contexts = flow.conditioned_on.examples(n, device)
    if contexts is None and context is not None:
        contexts = context.to(device)[torch.arange(n, device=device) % len(context)]
    if contexts is None:
        return None
    return flow.sample(1, temperature, contexts, shape=shape, generator=generator)[0]
