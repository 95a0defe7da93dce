"""How weights are updated: optimizer, warm-up, clipping, and what happens to a step that is not finite."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from flows.recompute import is_random
from lightning_modules.adamax import Adamax
from lightning_modules.noise import network_seed
from lightning_modules.objective import Objective
from lightning_modules.optimizer_steps import ends_step
from lightning_modules.schedule import Schedule, warm_up
from lightning_modules.stopping import Diverged

OPTIMIZERS = {"adam": torch.optim.Adam, "adamax": Adamax, "adamw": torch.optim.AdamW}
OptimizerName = Literal["adam", "adamax", "adamw"]  # the keys of OPTIMIZERS
ScheduleName = Literal["constant", "cosine"]
SCHEDULES: tuple[str, ...] = get_args(ScheduleName)


class OptimizedModule(Objective):
    """An objective that updates what is `trained`, and leaves it alone in steps whose loss or gradient is not finite.

    Such a step changes neither weights nor moments nor running statistics; it is counted in the buffer `skipped`. The
    gradient norm decides, on the device: no step waits for it, but in fp16 for the scaler. A loss that is not finite
    makes its gradient NaN (`finite_or_nan`), and DDP's mean over ranks carries a NaN to all of them, so ranks agree
    without another message.
    The count is read every `trainer.log_every_n_steps`; above `max_skipped` the run ends. In fp16 (16-mixed) it is the
    gradient scaler that skips, and is meant to when it tries a larger scale: there the first in a row does not count.

    name, lr, betas, weight_decay: the optimizer's. warmup_steps: linear from 0, per optimizer step. schedule: after
    the warm-up, `constant` or a `cosine` to 0 at the last step. cooldown_steps: a constant rate falls linearly to 0 in
    the last so many. clip_norm: of the global gradient norm, in the loss's unit. seed, noise_seed: of an `Objective`.
    """

    def __init__(
        self,
        name: OptimizerName = "adam",
        lr: float = 1e-3,
        betas: Sequence[float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        schedule: ScheduleName = "constant",
        cooldown_steps: int = 0,
        clip_norm: float | None = None,
        max_skipped: int = 20,
        seed: int = 0,
        noise_seed: int = 0,
    ) -> None:
        super().__init__(seed, noise_seed)
        if name not in OPTIMIZERS:
            raise ValueError(f"optim.name={name} is not known: give one of {', '.join(OPTIMIZERS)}")
        if schedule not in SCHEDULES:
            raise ValueError(
                f"optim.schedule={schedule} is not known: give one of {', '.join(SCHEDULES)}"
            )
        if len(betas) != 2:
            raise ValueError(f"optim.betas={list(betas)} are not two numbers")
        counts = {
            "warmup_steps": warmup_steps,
            "cooldown_steps": cooldown_steps,
            "max_skipped": max_skipped,
        }
        for key, value in counts.items():
            if value < 0:
                raise ValueError(f"optim.{key}={value}: it must not be negative")
        if clip_norm is not None and clip_norm <= 0:
            raise ValueError(f"optim.clip_norm={clip_norm}: it must not be negative")
        if cooldown_steps and schedule == "cosine":
            raise ValueError(
                f"optim.cooldown_steps={cooldown_steps}: a cosine ends at 0 by itself, give 0"
            )
        self.name, self.lr, self.betas, self.weight_decay = name, lr, tuple(betas), weight_decay
        self.warmup_steps, self.schedule, self.cooldown_steps = (
            warmup_steps,
            schedule,
            cooldown_steps,
        )
        self.clip_norm, self.max_skipped = clip_norm, max_skipped

    def configure_optimizers(self) -> dict:
        # The gradient scaler of fp16 and a fused optimizer each unscale: clipping would see scaled gradients.
        fused = {"fused": True} if self.name != "adamax" and not self._scaled() else {}
        optimizer = OPTIMIZERS[self.name](
            self.trained.parameters(),
            self.lr,
            betas=self.betas,
            weight_decay=self.weight_decay,
            **fused,
        )
        scheduler = Schedule(
            optimizer, warm_up(self.warmup_steps, self._last_step(), self.cooldown_steps)
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def _last_step(self) -> int | None:
        """At which the rate is 0; None where it stays. ValueError, one line: there is none, or it comes too early."""
        if self.schedule != "cosine" and not self.cooldown_steps:
            return None
        last, warmup, cooldown = self.trainer.max_steps, self.warmup_steps, self.cooldown_steps
        if last < 1:
            setting = f"cooldown_steps={cooldown}" if cooldown else "schedule=cosine"
            raise ValueError(f"optim.{setting} ends at the last step: set trainer.max_steps")
        if warmup + cooldown > last:
            advice = f"optim.warmup_steps={last // 10}" + (
                f" optim.cooldown_steps={last // 10}" if cooldown else ""
            )
            raise ValueError(
                f"optim.warmup_steps={warmup} and optim.cooldown_steps={cooldown} are more than "
                f"trainer.max_steps={last}: give these as well, for example {advice}"
            )
        return last

    def on_train_start(self) -> None:
        norms = (m for m in self.trained.modules() if isinstance(m, _BatchNorm))
        self._statistics = [b for m in norms for b in (m.running_mean, m.running_var)]
        self._is_random = is_random(self.trained)

    def on_train_batch_start(self, batch, batch_idx: int) -> None:
        if self._is_random:
            # Dropout draws from torch's own generator, which no checkpoint holds. Seeded by the place in training, it
            # is the same in a run that goes on; each rank and micro-batch has numbers of its own.
            torch.manual_seed(network_seed(self.seed, self.position(batch_idx)))
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self._before = flattened(self._statistics)

    def finite_or_nan(self, loss: Tensor) -> Tensor:
        """The same loss; its gradient is NaN where it is not finite. To be returned by training_step."""
        finite = loss.detach().isfinite()
        loss.register_hook(lambda grad: torch.where(finite, grad, torch.nan))
        return loss

    def configure_gradient_clipping(
        self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None
    ) -> None:
        """Clip the global norm here (Lightning refuses to where a fused optimizer meets mixed precision); skip."""
        parameters = [p for p in self.trained.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters])
        if self.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.clip_norm, norm)
        finite = norm.isfinite()
        self._restore_statistics(finite)
        if not self._scaled():
            optimizer.found_inf = (
                ~finite
            ).float()  # read on the device, where others would have to be asked here
        self.skipped += ~finite & self.skipped_last if self._scaled() else ~finite
        self.skipped_last.copy_(~finite)
        self.log_dict({"train/grad_norm": norm, "train/skipped_steps": self.skipped.float()})

    def on_train_batch_end(self, outputs, batch, batch_idx: int) -> None:
        read = self.trainer.global_step % self.trainer.log_every_n_steps == 0
        if read and ends_step(self.trainer, batch_idx):
            self.check_skipped()

    def check_skipped(self) -> None:
        """Diverged where more than `max_skipped` steps were not finite; waits for the device."""
        if (n := self.skipped.item()) > self.max_skipped:
            raise Diverged(
                f"stopped at step {self.trainer.global_step}: the loss or its gradient was not finite in {n} steps, "
                f"which were skipped; optim.max_skipped={self.max_skipped}. Lower optim.lr, lengthen "
                "optim.warmup_steps or set optim.clip_norm, in a new run_dir"
            )

    def _scaled(self) -> bool:
        return getattr(self.trainer.precision_plugin, "scaler", None) is not None

    def _restore_statistics(self, finite: Tensor) -> None:
        """Take back the running statistics of a step that is skipped, without asking the host whether it is."""
        if self._statistics:
            statistics = torch.where(finite, flattened(self._statistics), self._before)
            parts = statistics.split([b.numel() for b in self._statistics])
            torch._foreach_copy_(
                self._statistics,
                [p.view_as(b) for p, b in zip(parts, self._statistics, strict=True)],
            )


def flattened(tensors: list[Tensor]) -> Tensor | None:
    """One vector of all of them, a copy; None where there are none."""
    return torch.cat([t.flatten() for t in tensors]) if tensors else None
