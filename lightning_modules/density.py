"""Maximum likelihood: the objective of every flow that models p(x)."""

from collections.abc import Callable

import lightning.pytorch as L
import torch
from torch import Tensor, nn

from flows.base import FlowModel
from flows.likelihood import bits_per_dim
from lightning_modules.batch_norm import has_batch_norm, reestimated
from lightning_modules.metrics import full_float32, image_mean
from lightning_modules.noise import batch_noise, image_noise
from lightning_modules.schedule import WarmUp

OPTIMIZERS = {"adam": torch.optim.Adam, "adamax": torch.optim.Adamax, "adamw": torch.optim.AdamW}
SCHEDULES = ("constant", "cosine")


class DensityModule(L.LightningModule):
    """Minimises the mean of -log p(x) in nats per datum, plus l2 * flow.l2_penalty() where l2 > 0.

    With n_bits (images) it logs `train/bpd`, `val/bpd`, `test/bpd` in bits/dim; without (points) `train/nll` etc. in
    nats. Evaluation runs in float32. A flow with batch norm is tested twice in one pass: `test/bpd` with its running
    statistics, `test/bpd_reestimated` after estimating them on `bn_images` training images; averaged weights (EMA)
    have no running statistics of their own, so for them every evaluation uses re-estimated ones. bn_images=0: never.

    dequantizer: (integers, noise) -> x, or None. seed: of the training noise. noise_seed: of the evaluation noise.
    name, lr, betas, weight_decay: the optimizer's. warmup_steps: linear from 0, per iteration. clip_norm: of the
    global gradient norm, in nats. schedule: after the warm-up, `constant` or a `cosine` to 0 at the last step.
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
        clip_norm: float | None = None,
        noise_seed=0,
        bn_images=10_000,
    ) -> None:
        super().__init__()
        if name not in OPTIMIZERS:
            raise ValueError(f"optim.name={name} is not known: give one of {', '.join(OPTIMIZERS)}")
        if schedule not in SCHEDULES:
            raise ValueError(f"optim.schedule={schedule} is not known: give one of {', '.join(SCHEDULES)}")
        if len(betas) != 2:
            raise ValueError(f"optim.betas={list(betas)} are not two numbers")
        if l2 and not hasattr(flow, "l2_penalty"):
            raise ValueError(f"optim.l2={l2}: {type(flow).__name__} has no such penalty, give 0")
        if min(warmup_steps, bn_images) < 0 or (clip_norm is not None and clip_norm <= 0):
            raise ValueError("optim.warmup_steps, optim.clip_norm and eval.bn_images must not be negative")
        self.flow, self.dequantizer, self.n_bits, self.seed = flow, dequantizer, n_bits, seed
        self.name, self.lr, self.betas, self.weight_decay = name, lr, tuple(betas), weight_decay
        self.l2, self.warmup_steps, self.schedule, self.clip_norm = l2, warmup_steps, schedule, clip_norm
        self.noise_seed, self.bn_images = noise_seed, bn_images
        self.metric = "nll" if n_bits is None else "bpd"
        self.train_mean = image_mean()
        self.eval_means = nn.ModuleDict({"as_is": image_mean(), "_reestimated": image_mean()})
        self._evaluated: dict[str, nn.Module] = {}  # suffix of the metric -> flow

    def loss_per_datum(self, log_prob: Tensor) -> Tensor:
        """Bits/dim for images, nats for points: what is logged, (B,)."""
        if self.n_bits is None:
            return -log_prob
        return bits_per_dim(log_prob, torch.Size(self.flow.shape).numel(), self.n_bits)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        log_prob = self.flow.log_prob(self._training_input(batch[0], self.current_epoch, batch_idx))
        per_datum = self.loss_per_datum(log_prob.detach())
        self.train_mean.update(per_datum)
        self.log(f"train/{self.metric}", per_datum.mean(), prog_bar=True)
        loss = -log_prob.mean()
        return loss + self.l2 * self.flow.l2_penalty() if self.l2 else loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def on_validation_epoch_start(self) -> None:
        self._prepare_evaluation(both=False)

    def on_test_epoch_start(self) -> None:
        self._prepare_evaluation(both=True)

    def _evaluate(self, batch: tuple[Tensor, Tensor], split: str) -> None:
        data, indices = batch
        if self.dequantizer is not None:
            noise = image_noise(indices, data.shape[1:], self.noise_seed).to(data.device)
            data = self.dequantizer(data, noise)
        for suffix, flow in self._evaluated.items():
            with full_float32(self.device.type):
                per_datum = self.loss_per_datum(flow.log_prob(data))
            mean = self.eval_means[suffix or "as_is"]
            mean.update(per_datum)
            self.log(f"{split}/{self.metric}{suffix}", mean, on_step=False, on_epoch=True, prog_bar=not suffix)

    def _prepare_evaluation(self, both: bool) -> None:
        self._evaluated = {"": self.flow}
        averaged = any(isinstance(c, L.callbacks.WeightAveraging) for c in self.trainer.callbacks)
        wanted = self.bn_images > 0 and (both or averaged) and not self.trainer.sanity_checking
        if not wanted or not has_batch_norm(self.flow):
            return
        with full_float32(self.device.type):
            batches = enumerate(self.trainer.datamodule.train_batches(self.bn_images))
            inputs = (self._training_input(data.to(self.device), 0, i, whole=True) for i, (data, _) in batches)
            fresh = reestimated(self.flow, inputs)
        self._evaluated = {"": fresh} if averaged else {"": self.flow, "_reestimated": fresh}

    def _training_input(self, data: Tensor, epoch: int, batch_idx: int, whole: bool = False) -> Tensor:
        """This rank's slice of the global batch, dequantised; `whole`: `data` is all of the global batch."""
        if self.dequantizer is None:
            return data
        world, rank = (1, 0) if whole else (self.trainer.world_size, self.trainer.global_rank)
        n = len(data)
        noise = batch_noise((world * n, *data.shape[1:]), self.seed, epoch, batch_idx, data.device)
        return self.dequantizer(data, noise[rank * n : (rank + 1) * n])

    def configure_optimizers(self) -> dict:
        fused = {} if self.name == "adamax" else {"fused": True}
        optimizer = OPTIMIZERS[self.name](
            self.flow.parameters(), self.lr, betas=self.betas, weight_decay=self.weight_decay, **fused
        )
        if self.schedule == "cosine" and self.trainer.max_steps < 1:
            raise ValueError("optim.schedule=cosine ends at the last step: set trainer.max_steps")
        factor = WarmUp(self.warmup_steps, self.trainer.max_steps if self.schedule == "cosine" else None)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        """Clip the global norm here: Lightning refuses to where a fused optimizer meets mixed precision."""
        if self.clip_norm is not None:
            norm = nn.utils.clip_grad_norm_(self.flow.parameters(), self.clip_norm)
            self.log("train/grad_norm", norm)
