"""Maximum likelihood: the objective of every flow that models p(x)."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence

import lightning.pytorch as L
import torch
from torch import Tensor, nn

from flows.base import FlowModel
from flows.likelihood import bits_per_dim
from flows.normalization import uninitialized
from lightning_modules.batch_norm import has_batch_norm, reestimated
from lightning_modules.cuda_graph import CudaGraph
from lightning_modules.metrics import image_mean
from lightning_modules.noise import FLOW, Position, evaluation_input, image_noise
from lightning_modules.objective import Input, context_of
from lightning_modules.optimization import OptimizedModule, OptimizerName, ScheduleName
from lightning_modules.precision import evaluation
from results.metrics import Metric


class DensityModule(OptimizedModule):
    """Minimises the mean of -log p(x) in nats per datum, plus l2 * flow.l2_penalty() where l2 > 0.

    With n_bits (images) it logs `train/bpd`, `val/bpd`, `test/bpd` in bits/dim; without (points) `train/nll` etc. in
    nats. What kind of figure that is stands in its name: `bpd_bound` with a learned dequantiser, whose log_weight is
    added to log p(x), in training too; `bpd_noisy` with one whose noise leaves the bin; `bpd_estimate` with a flow
    whose log-determinant is an estimate. Evaluation runs in float32.

    A flow with batch norm is tested twice in one pass: `test/bpd` with its running statistics, `test/bpd_reestimated`
    after estimating them on `bn_images` training images; averaged weights (EMA) have no running statistics of their
    own, so for them every evaluation uses re-estimated ones. bn_images=0: never.

    noise_samples: k > 1 adds the bound of k noise samples an image, `bpd_iw<k>` (Burda et al. 2016),

        log 1/k sum_i p(x_i) / q(x_i | q),

    to evaluation; `bpd` stays that of the first sample.
    dequantizer: a `Dequantizer`, whose parameters, if any, are trained with the flow's; None for real numbers. seed: of
    the training noise. noise_seed: of the evaluation noise. shape: of one datum; None: the flow's.
    The optimizer's arguments are those of `OptimizedModule`. A subclass that adds to the likelihood replaces
    `objective`, `evaluate` and `extra_metrics`.
    """

    extra_metrics: tuple[Metric, ...] = ()  # what `evaluate` measures beside the likelihood

    def __init__(
        self,
        flow: FlowModel,
        dequantizer: nn.Module | None,
        n_bits: int | None,
        seed: int,
        name: OptimizerName = "adam",
        lr: float = 1e-3,
        betas: Sequence[float] = (0.9, 0.999),
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
        )
        if l2 and not hasattr(flow, "l2_penalty"):
            raise ValueError(f"optim.l2={l2}: {type(flow).__name__} has no such penalty, give 0")
        if bn_images < 0:
            raise ValueError(
                f"eval.bn_images={bn_images} is negative: give a number of images, or 0 for none"
            )
        if dequantizer is not None and has_batch_norm(dequantizer):
            raise ValueError(
                f"{type(dequantizer).__name__} has batch norms, whose statistics nobody re-estimates"
            )
        self.flow, self.dequantizer, self.n_bits = flow, dequantizer, n_bits
        self.shape = tuple(flow.shape if shape is None else shape)
        self.l2, self.bn_images, self.noise_samples = l2, bn_images, noise_samples
        self.cuda_graph: CudaGraph | None = None  # of training steps; `capture` sets it
        self.metrics = (*self._likelihoods(), *self.extra_metrics)
        names = [
            f"{metric.name}{suffix}" for metric in self.metrics for suffix in ("", REESTIMATED)
        ]
        self.eval_means = nn.ModuleDict({name: image_mean() for name in names})
        self._evaluated: dict[str, nn.Module] = {}  # suffix of the metrics -> flow

    @classmethod
    def of(
        cls,
        config,
        flow: FlowModel,
        data: L.LightningDataModule,
        dequantizer: nn.Module | None = None,
    ):
        """The module of a recipe. dequantizer: a learned one, in the place of the data's."""
        dequantizer = data.dequantizer if dequantizer is None else dequantizer
        settings = {**config.optim, **config.eval}
        return cls(flow, dequantizer, data.n_bits, config.seed, shape=data.shape, **settings)

    def _likelihoods(self) -> list[Metric]:
        """The metric of one noise sample and, where more are taken, that of all of them. ValueError: there is none."""
        kind = "exact" if self.dequantizer is None else self.dequantizer.kind
        if self.flow.noise_shape is not None:
            kind = "estimate" if kind == "exact" else f"{kind}_estimate"
        quantity, unit = ("nll", "nats") if self.n_bits is None else ("bpd", "bits/dim")
        single = Metric(quantity, "lower", unit, kind)
        k = self.noise_samples
        if k == 1:
            return [single]
        if k < 1:
            raise ValueError(f"eval.noise_samples={k}: give at least 1")
        if (
            self.dequantizer is None
            or self.flow.noise_shape is not None
            or kind.startswith("noisy")
        ):
            reason = (
                "no noise is drawn"
                if self.dequantizer is None
                else f"{single.name} is no bound to tighten"
            )
            raise ValueError(f"eval.noise_samples={k}, but {reason}: give 1")
        return [single, Metric(quantity, "lower", unit, "iw", k)]

    # ------------------------------------------------------------------------------------------ what it declares

    @property
    def trained(self) -> nn.Module:
        """The flow; with a dequantiser that has parameters both, the flow first."""
        return nn.ModuleList([self.flow, self.dequantizer]) if self._learns_noise else self.flow

    @property
    def model_name(self) -> str:
        return type(self.flow).__name__

    @property
    def needs_autograd(self) -> bool:
        return self.flow.needs_autograd

    def constructors(self) -> dict[str, type]:
        return {**super().constructors(), "flow": type(self.flow)}

    @property
    def _learns_noise(self) -> bool:
        return (
            self.dequantizer is not None and next(self.dequantizer.parameters(), None) is not None
        )

    def check_data(self, data: L.LightningDataModule) -> None:
        """ValueError, one line: the flow is conditioned on what the data have not."""
        n_classes = self.flow.n_classes
        if (
            n_classes is None
        ):  # a context of another kind is looked at by the flow, in the first batch
            return
        if not data.labels:
            raise ValueError(
                f"flow.n_classes={n_classes} needs classes: give data.labels=true, where the data have them"
            )
        if n_classes != data.n_classes:
            raise ValueError(
                f"flow.n_classes={n_classes}, but {type(data).__name__} has {data.n_classes}: "
                f"give flow.n_classes={data.n_classes}"
            )

    def needs_initialization(self) -> bool:
        parts = [self.flow] if self.dequantizer is None else [self.flow, self.dequantizer]
        return any(uninitialized(part) for part in parts)

    @torch.no_grad()
    def initialize(self, batch: list[Tensor]) -> None:
        """Set the ActNorms of the dequantiser, then the flow's, with the noise of a first step; float32."""
        with evaluation(self.device.type):
            if self.dequantizer is not None:
                noise = self._dequantization_noise(batch[0].shape, Position(epoch=0, step=0))
                self.dequantizer.initialize(batch[0], noise, self.context(batch))
            x, context, *_ = self.training_input(batch, Position(epoch=0, step=0))
            self.flow.initialize(x, context)

    def trial(self, n: int) -> Tensor | None:
        if len(self.shape) != 3 or None in self.shape:
            return None
        datum = torch.rand(n, *self.shape)
        if self.dequantizer is not None:
            datum = (datum * 2**self.n_bits).to(torch.uint8)
        context = []
        if self.flow.conditioned_on is not None:
            context = [self.flow.conditioned_on.examples(n, torch.device("cpu"))]
            if context == [None]:
                return None
        made_up = self.training_input([datum, torch.arange(n), *context], Position(epoch=0, step=0))
        return -(self.flow.log_prob(*made_up.arguments) + made_up.log_weight).mean()

    def capture(self) -> None:
        """The flow's passes; a dequantiser stays outside of the graph."""
        self.cuda_graph = CudaGraph(self.flow)

    def draw(
        self, n: int, temperature: float, seed: int, batch: list[Tensor] | None = None
    ) -> Tensor | None:
        context = None if batch is None else self.context(batch)
        shape = self.shape
        if None in shape:  # data of several sizes: as large as the validation data
            if batch is None:
                return None
            shape = tuple(batch[0].shape[1:])
        with self._gradients():
            samples = drawn(self.flow, n, temperature, seed, shape, context)
        return None if samples is None else samples.detach()

    def reconstruct(self, batch: list[Tensor]) -> tuple[Tensor, Tensor] | None:
        """The data and f^-1(f(x)); None for data that are not dequantised."""
        if self.dequantizer is None:
            return None
        with self._gradients():
            x, *rest = self.input_of(batch).arguments
            latents, _ = self.flow(x, *rest)
            again, _ = self.flow.inverse(latents, *rest)
        return x.detach(), again.detach()

    # ------------------------------------------------------------------------------------------ inputs

    def context(self, batch: list[Tensor]) -> Tensor | None:
        """What the flow is conditioned on; None, whatever the batch holds, where it is conditioned on nothing."""
        return None if self.flow.conditioned_on is None else context_of(batch)

    def training_input(self, batch: list[Tensor], at: Position) -> Input:
        """A micro-batch, dequantised with the noise of its place in training."""
        q, context = batch[0], self.context(batch)
        shape = None if self.flow.noise_shape is None else (len(q), *self.flow.noise_shape)
        noise = None if shape is None else self.training_noise(shape, at, stream=FLOW)
        if self.dequantizer is None:
            return Input(q, context, torch.zeros(len(q), device=q.device, dtype=q.dtype), noise)
        x, log_weight = self.dequantizer(q, self._dequantization_noise(q.shape, at), context)
        return Input(x, context, log_weight, noise)

    def input_of(self, batch: list[Tensor], k: int = 0) -> Input:
        """A batch with each datum's own noise, keyed (noise_seed, index, k)."""
        q, indices, context = batch[0], batch[1], self.context(batch)
        noise = (
            None if self.flow.noise_shape is None else self._estimation_noise(indices, k, q.device)
        )
        if self.dequantizer is None:
            return Input(q, context, torch.zeros(len(q), device=q.device, dtype=q.dtype), noise)
        sample = evaluation_input(
            self.dequantizer, q, indices, self.noise_seed, self.dtype, k, context
        )
        return Input(sample[0], context, sample[1], noise)

    def _estimation_noise(self, indices: Tensor, k: int, device: torch.device) -> Tensor:
        noise = image_noise(indices, self.flow.noise_shape, self.noise_seed, k, stream=FLOW)
        return noise.to(device, self.dtype)

    def _dequantization_noise(self, shape: torch.Size, at: Position) -> Tensor:
        return self.training_noise(tuple(shape), at, self.dequantizer.noise)

    # ------------------------------------------------------------------------------------------ training

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        sample = self.training_input(batch, self.position(batch_idx))
        log_prob, penalty = self.objective(*sample.arguments)
        integrand = log_prob + sample.log_weight
        loss = penalty - integrand.mean()
        per_datum = self.loss_per_datum(integrand.detach(), sample.x[0].numel())
        self.train_mean.update(per_datum)
        self.log(
            f"train/{self.metric.name}", per_datum.mean(), prog_bar=True
        )  # of this rank; the curve's is of all
        return self.finite_or_nan(loss + self.l2 * self.flow.l2_penalty() if self.l2 else loss)

    def objective(self, x: Tensor, context=None, *noise: Tensor) -> tuple[Tensor, Tensor | float]:
        """log p(x | context), (B,) nats, and what is added to the mean of -log p(x | context), a scalar.

        A subclass calls the flow by way of `run`.
        """
        return self.run(self.flow.log_prob, x, context, *noise), 0.0

    def run(self, method: Callable, *inputs: Tensor | None):
        """method(*inputs) of the flow in training, replayed as a CUDA graph where that is wanted."""
        return method(*inputs) if self.cuda_graph is None else self.cuda_graph(method, *inputs)

    def loss_per_datum(self, log_prob: Tensor, n_dims: int | None = None) -> Tensor:
        """Bits/dim for images, nats for points: what is logged, (B,). n_dims: D of a datum; None: that of `shape`."""
        if self.n_bits is None:
            return -log_prob
        return bits_per_dim(
            log_prob, math.prod(self.shape) if n_dims is None else n_dims, self.n_bits
        )

    # ------------------------------------------------------------------------------------------ evaluation

    def evaluate(
        self, flow: FlowModel, x: Tensor, context=None, *noise: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """log p(x | context) under `flow`, (B,) nats, and `extra_metrics` of every datum by name, (B,) each.

        flow: this module's, or a copy with other batch-norm statistics, for which every metric is logged apart.
        """
        return flow.log_prob(x, context, *noise), {}

    def log_prob(self, x: Tensor, context=None) -> Tensor:
        """log p(x | context), (B,) nats, of data that need no dequantisation, by the flow as it is.

        An estimated log-determinant has the noise of the data's numbers in x.
        """
        noise = ()
        if self.flow.noise_shape is not None:
            noise = (self._estimation_noise(torch.arange(len(x)), 0, x.device),)
        with evaluation(self.device.type), self._gradients():
            return self.flow.log_prob(x, context, *noise).detach()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self._measure(batch, "val")

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self._measure(batch, "test")

    def on_validation_epoch_start(self) -> None:
        self._prepare_evaluation(both=False)

    def on_test_epoch_start(self) -> None:
        self._prepare_evaluation(both=True)

    def _measure(self, batch: list[Tensor], split: str) -> None:
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
        """Means over all data of an evaluation. measures: name -> (B,)."""
        for name, values in measures.items():
            mean = self.eval_means[f"{name}{suffix}"]
            mean.update(values.detach())
            in_bar = name == self.metric.name and not suffix
            self.log(f"{split}/{name}{suffix}", mean, on_step=False, on_epoch=True, prog_bar=in_bar)

    @contextlib.contextmanager
    def _gradients(self) -> Iterator[None]:
        """With gradients where the flow's evaluation takes some, else without."""
        with torch.set_grad_enabled(self.needs_autograd):
            yield

    def _prepare_evaluation(self, both: bool) -> None:
        self._evaluated = {"": self.flow}
        averaged = any(isinstance(c, L.callbacks.WeightAveraging) for c in self.trainer.callbacks)
        asked = self.bn_images > 0 and (both or averaged)
        if not asked or self.trainer.sanity_checking or not has_batch_norm(self.flow):
            return
        with evaluation(self.device.type), self._gradients():
            batches = enumerate(self.trainer.datamodule.train_batches(self.bn_images))
            inputs = (
                self._reestimation_input(batch, number).arguments for number, batch in batches
            )
            fresh = reestimated(self.flow, inputs)
        self._evaluated = {"": fresh} if averaged else {"": self.flow, REESTIMATED: fresh}

    def _reestimation_input(self, batch: list[Tensor], number: int) -> Input:
        """A batch of the first epoch, with the noise that it has there."""
        at = Position(0, number, self.trainer.global_rank, self.trainer.world_size)
        return self.training_input([part.to(self.device) for part in batch], at)


REESTIMATED = "_reestimated"  # ends the names of metrics under re-estimated batch-norm statistics


def log_mean_exp(samples: list[Tensor]) -> Tensor:
    """log of the mean of exp over samples of (B,) each, in float64, (B,)."""
    return torch.stack(samples).double().logsumexp(0) - math.log(len(samples))


def drawn(
    flow: FlowModel,
    n: int,
    temperature: float,
    seed: int,
    shape: tuple[int, ...] | None = None,
    context: Tensor | None = None,
) -> Tensor | None:
    """n samples, (n, *shape), of the same eps at every temperature.

    A class-conditional flow has its classes in turn. A flow whose contexts cannot be made up takes those of `context`,
    (B, ...), in turn; None where there are none. shape: of one datum, for a flow of any size.
    """
    generator = torch.Generator().manual_seed(seed)
    decides_itself = type(flow).sample_shape is not FlowModel.sample_shape
    shape = None if decides_itself or None not in flow.shape else shape
    if flow.conditioned_on is None:
        return flow.sample(n, temperature, shape=shape, generator=generator)
    device = next(flow.parameters()).device
    contexts = flow.conditioned_on.examples(n, device)
    if contexts is None and context is not None:
        contexts = context.to(device)[torch.arange(n, device=device) % len(context)]
    if contexts is None:
        return None
    return flow.sample(1, temperature, contexts, shape=shape, generator=generator)[0]
