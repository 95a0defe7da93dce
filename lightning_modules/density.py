"""Maximum likelihood: the objective of every flow that models p(x)."""

from collections.abc import Callable

import lightning.pytorch as L
import torch
from torch import Tensor, nn

from flows.base import FlowModel
from flows.likelihood import bits_per_dim
from lightning_modules.batch_norm import has_batch_norm, reestimated
from lightning_modules.cuda_graph import CudaGraph
from lightning_modules.metrics import FiniteMean, image_mean
from lightning_modules.noise import batch_noise, evaluation_input
from lightning_modules.optimization import OptimizedModule
from lightning_modules.precision import evaluation


class DensityModule(OptimizedModule):
    """Minimises the mean of -log p(x) in nats per datum, plus l2 * flow.l2_penalty() where l2 > 0.

    With n_bits (images) it logs `train/bpd`, `val/bpd`, `test/bpd` in bits/dim; without (points) `train/nll` etc. in
    nats. Evaluation runs in float32. A flow with batch norm is tested twice in one pass: `test/bpd` with its running
    statistics, `test/bpd_reestimated` after estimating them on `bn_images` training images; averaged weights (EMA)
    have no running statistics of their own, so for them every evaluation uses re-estimated ones. bn_images=0: never.

    dequantizer: (integers, noise) -> x, or None. seed: of the training noise. noise_seed: of the evaluation noise.
    The optimizer's arguments are those of `OptimizedModule`. Batches are (datum, index) or (datum, index, context).
    """

    def __init__(
        self,
        flow: FlowModel,
        dequantizer: Callable[[Tensor, Tensor], Tensor] | None,
        n_bits: int | None,
        seed: int,
        name="adam",
        lr=1e-3,
        betas=(0.9, 0.999),
        weight_decay=0.0,
        l2=0.0,
        warmup_steps=0,
        schedule="constant",
        cooldown_steps=0,
        clip_norm: float | None = None,
        max_skipped=20,
        noise_seed=0,
        bn_images=10_000,
    ) -> None:
        super().__init__(name, lr, betas, weight_decay, warmup_steps, schedule, cooldown_steps, clip_norm, max_skipped)
        if l2 and not hasattr(flow, "l2_penalty"):
            raise ValueError(f"optim.l2={l2}: {type(flow).__name__} has no such penalty, give 0")
        if bn_images < 0:
            raise ValueError(f"eval.bn_images={bn_images} is negative: give a number of images, or 0 for none")
        self.flow, self.dequantizer, self.n_bits, self.seed = flow, dequantizer, n_bits, seed
        self.l2, self.noise_seed, self.bn_images = l2, noise_seed, bn_images
        self.cuda_graph: CudaGraph | None = None  # of training steps; set it before training
        self.metric = "nll" if n_bits is None else "bpd"
        self.train_mean = FiniteMean()  # a step that is skipped does not count
        self.eval_means = nn.ModuleDict({"as_is": image_mean(), "_reestimated": image_mean()})
        self._evaluated: dict[str, nn.Module] = {}  # suffix of the metric -> flow

    def loss_per_datum(self, log_prob: Tensor) -> Tensor:
        """Bits/dim for images, nats for points: what is logged, (B,)."""
        if self.n_bits is None:
            return -log_prob
        return bits_per_dim(log_prob, torch.Size(self.flow.shape).numel(), self.n_bits)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x = self._training_input(batch[0], self.current_epoch, batch_idx, self.trainer.accumulate_grad_batches)
        log_prob, loss = self._objective(x, *batch[2:])
        per_datum = self.loss_per_datum(log_prob.detach())
        self.train_mean.update(per_datum)
        self.log(f"train/{self.metric}", per_datum.mean(), prog_bar=True)  # of this rank; the curve's is of all
        return self.finite_or_nan(loss + self.l2 * self.flow.l2_penalty() if self.l2 else loss)

    def _objective(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        """log p(x), (B,) nats, and what is minimised but for the L2 penalty, a scalar."""
        log_prob = self._run(self.flow.log_prob, x, *context)
        return log_prob, -log_prob.mean()

    def _run(self, method: Callable, *inputs: Tensor):
        """method(*inputs) of the flow, in training."""
        return method(*inputs) if self.cuda_graph is None else self.cuda_graph(method, *inputs)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def on_validation_epoch_start(self) -> None:
        self._prepare_evaluation(both=False)

    def on_test_epoch_start(self) -> None:
        self._prepare_evaluation(both=True)

    def _evaluate(self, batch: tuple[Tensor, Tensor], split: str) -> None:
        data, indices, *context = batch
        if self.dequantizer is not None:
            data = evaluation_input(self.dequantizer, data, indices, self.noise_seed, self.dtype)
        for suffix, flow in self._evaluated.items():
            with evaluation(self.device.type):
                per_datum = self.loss_per_datum(self._log_prob(flow, data, *context))
            mean = self.eval_means[suffix or "as_is"]
            mean.update(per_datum)
            self.log(f"{split}/{self.metric}{suffix}", mean, on_step=False, on_epoch=True, prog_bar=not suffix)

    def _log_prob(self, flow: FlowModel, x: Tensor, context=None) -> Tensor:
        return flow.log_prob(x, context)

    @torch.no_grad()
    def initialize(self, batch: tuple[Tensor, ...]) -> None:
        """Set the flow's ActNorms from a batch, with the noise of a first step; float32."""
        with evaluation(self.device.type):
            data, _, *context = batch
            noise = batch_noise(tuple(data.shape), self.seed, 0, 0, data.device).to(self.dtype)
            self.flow.initialize(data if self.dequantizer is None else self.dequantizer(data, noise), *context)

    def _prepare_evaluation(self, both: bool) -> None:
        self._evaluated = {"": self.flow}
        averaged = any(isinstance(c, L.callbacks.WeightAveraging) for c in self.trainer.callbacks)
        wanted = self.bn_images > 0 and (both or averaged) and not self.trainer.sanity_checking
        if not wanted or not has_batch_norm(self.flow):
            return
        with evaluation(self.device.type):
            batches = enumerate(self.trainer.datamodule.train_batches(self.bn_images))
            inputs = (self._training_input(data.to(self.device), 0, i, n_micro=1) for i, (data, *_) in batches)
            fresh = reestimated(self.flow, inputs)
        self._evaluated = {"": fresh} if averaged else {"": self.flow, "_reestimated": fresh}

    def _training_input(self, data: Tensor, epoch: int, batch_idx: int, n_micro: int) -> Tensor:
        """This rank's micro-batch, dequantised: number batch_idx of an epoch in which `n_micro` make a step."""
        if self.dequantizer is None:
            return data
        n, step, rank = len(data), batch_idx // n_micro, self.trainer.global_rank
        noise = batch_noise(
            (self.trainer.world_size * n_micro * n, *data.shape[1:]), self.seed, epoch, step, data.device
        )
        start = (rank * n_micro + batch_idx % n_micro) * n
        return self.dequantizer(data, noise[start : start + n].to(self.dtype))
