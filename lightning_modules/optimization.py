"""How weights are updated: optimizer, warm-up, clipping, and steps that are not finite."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from flows.recompute import is_random
from lightning_modules.adamax import Adamax
from lightning_modules.checks import check_count, check_not_negative, check_number
from lightning_modules.lightning_internals import steps_between_logs
from lightning_modules.noise import network_seed
from lightning_modules.objective import Objective
from lightning_modules.optimizer_steps import ends_step
from lightning_modules.schedule import Schedule, step_down, warm_up
from lightning_modules.stopping import Diverged
from results import is_number

OptimizerName = Literal["adam", "adamax", "adamw"]
ScheduleName = Literal["constant", "cosine", "milestones"]
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamax": Adamax,
    "adamw": torch.optim.AdamW,
}
SCHEDULES: tuple[str, ...] = get_args(ScheduleName)


class OptimizedModule(Objective):
    """An objective that updates what is `trained`, and skips steps that are not finite.

    A step whose loss or gradient is not finite changes neither weights nor moments nor running
    statistics. It is counted in the buffer `skipped`, which is read every
    `trainer.log_every_n_steps`. If it exceeds `max_skipped`, the run ends.

    Whether a step is skipped depends on the norm of its gradient and is decided on the device, so
    that the host never waits for it (only in fp16 the gradient scaler does). A loss that is not
    finite makes its gradient NaN (`finite_or_nan`), and DDP averages gradients, so that a NaN on
    one rank reaches all ranks and they decide alike. In fp16 (16-mixed) the gradient scaler skips
    steps itself, and does so on purpose when it tries a larger scale. There a step counts only if
    the step before it was skipped too.

    name, lr, betas, weight_decay: the optimizer and its arguments.
    warmup_steps: the number of steps in which the learning rate rises linearly from 0.
    schedule: the learning rate after the warm-up: `constant`; `cosine`, which reaches 0 at the last
        step; or `milestones`, at each of which it is multiplied by gamma.
    cooldown_steps: the number of last steps, in which a constant rate falls linearly to 0.
    milestones: shares of the steps of the run, for schedule=milestones alone.
    gamma: the factor at a milestone.
    clip_norm: the largest global gradient norm, in the unit of the loss; None: no clipping.
    max_skipped: how many steps may be skipped before the run ends.
    seed, noise_seed: the seeds of an `Objective`.
    Raises ValueError: one of them is out of its range.
    """

    def __init__(
        self,
        name: OptimizerName = "adam",
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        schedule: ScheduleName = "constant",
        cooldown_steps: int = 0,
        clip_norm: float | None = None,
        max_skipped: int = 20,
        seed: int = 0,
        noise_seed: int = 0,
        milestones: Sequence[float] = (0.5, 0.75, 0.9, 0.95),
        gamma: float = 0.5,
    ) -> None:
        super().__init__(seed, noise_seed)
        if name not in OPTIMIZERS:
            raise ValueError(f"optim.name={name} is not known: give one of {', '.join(OPTIMIZERS)}")
        if schedule not in SCHEDULES:
            raise ValueError(
                f"optim.schedule={schedule} is not known: give one of {', '.join(SCHEDULES)}"
            )
        check_not_negative("optim.lr", lr)
        check_betas(betas)
        check_not_negative("optim.weight_decay", weight_decay)
        check_count("optim.warmup_steps", warmup_steps)
        check_count("optim.cooldown_steps", cooldown_steps)
        check_count("optim.max_skipped", max_skipped)
        if clip_norm is not None:
            check_number(
                "optim.clip_norm",
                clip_norm,
                "a positive number, or null for no clipping",
                lambda norm: norm > 0,
            )
        if cooldown_steps and schedule == "cosine":
            raise ValueError(
                f"optim.cooldown_steps={cooldown_steps}: a cosine ends at 0 by itself: give 0"
            )
        if cooldown_steps and schedule == "milestones":
            raise ValueError(
                f"optim.cooldown_steps={cooldown_steps}: the rate falls at optim.milestones: give 0"
            )
        check_milestones(milestones)
        check_number(
            "optim.gamma", gamma, "a positive number of at most 1", lambda factor: 0 < factor <= 1
        )
        self.name = name
        self.lr = lr
        self.betas = tuple(betas)
        self.weight_decay = weight_decay
        self.warmup_steps = warmup_steps
        self.schedule = schedule
        self.cooldown_steps = cooldown_steps
        self.milestones = tuple(milestones)
        self.gamma = gamma
        self.clip_norm = clip_norm
        self.max_skipped = max_skipped
        self._statistics: list[Tensor] = []  # running means and variances, during training
        self._statistics_before = torch.empty(0)  # their values before the step, as one vector
        self._is_random = False  # whether the networks draw random numbers in training

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The optimizer and its learning-rate schedule. Raises ValueError as `_last_step` does."""
        options: dict[str, Any] = {}
        # With fp16, a fused optimizer unscales gradients itself, but only after they are clipped.
        if self.name != "adamax" and not self._scaled():
            options["fused"] = True
        optimizer = OPTIMIZERS[self.name](
            self.trained.parameters(),
            self.lr,
            betas=self.betas,
            weight_decay=self.weight_decay,
            **options,
        )
        factor = self._rate_factor(self._last_step())
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": Schedule(optimizer, factor), "interval": "step"},
        }

    def _rate_factor(self, last: int | None) -> Callable[[int], float]:
        """The factor of the learning rate by the step. last: what `_last_step` returns."""
        if self.schedule == "milestones" and last is not None:
            milestones = [round(share * last) for share in self.milestones]
            return step_down(self.warmup_steps, milestones, self.gamma)
        return warm_up(self.warmup_steps, last, self.cooldown_steps)

    def _last_step(self) -> int | None:
        """The step at which the schedule of the learning rate ends; None if it stays constant.

        Raises ValueError: the run has no last step, or too few steps for warm-up and cooldown.
        """
        if self.schedule == "constant" and not self.cooldown_steps:
            return None
        last = self.trainer.max_steps
        warmup = self.warmup_steps
        cooldown = self.cooldown_steps
        if last < 1:
            setting = f"cooldown_steps={cooldown}" if cooldown else f"schedule={self.schedule}"
            raise ValueError(f"optim.{setting} ends at the last step: set trainer.max_steps")
        if warmup + cooldown > last:
            advice = f"optim.warmup_steps={last // 10}"
            if cooldown:
                advice += f" optim.cooldown_steps={last // 10}"
            raise ValueError(
                f"optim.warmup_steps={warmup} and optim.cooldown_steps={cooldown} are more than "
                f"trainer.max_steps={last}: give these as well, for example {advice}"
            )
        return last

    def on_train_start(self) -> None:
        """Collect the running statistics, and check whether the networks draw random numbers."""
        norms = [m for m in self.trained.modules() if isinstance(m, _BatchNorm)]
        buffers = [b for norm in norms for b in (norm.running_mean, norm.running_var)]
        self._statistics = [b for b in buffers if b is not None]
        self._is_random = is_random(self.trained)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed networks that draw random numbers, and store the statistics before the step."""
        if self._is_random:
            # Dropout draws from torch's global generator, whose state is not in a checkpoint.
            # Seeded by the place in training, a resumed run draws the same numbers, and each rank
            # and micro-batch draws its own.
            torch.manual_seed(network_seed(self.seed, self.position(batch_idx)))
        if batch_idx % self.trainer.accumulate_grad_batches == 0 and self._statistics:
            self._statistics_before = flattened(self._statistics)

    def finite_or_nan(self, loss: Tensor) -> Tensor:
        """The same loss, a scalar, but with a NaN gradient if the loss is not finite.

        `training_step` has to return it.
        """
        finite = loss.detach().isfinite()
        loss.register_hook(lambda grad: torch.where(finite, grad, torch.nan))
        return loss

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the global gradient norm, and let the step be skipped if the norm is not finite.

        Lightning's own clipping refuses fused optimizers in mixed precision.
        """
        parameters = [p for p in self.trained.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.clip_norm, norm)
        finite = norm.isfinite()
        self._restore_statistics(finite)
        counted = ~finite
        if self._scaled():
            counted = counted & self.skipped_last
        else:
            # Fused optimizers and our Adamax read this on the device; others would have to wait.
            optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        self.skipped += counted
        self.skipped_last.copy_(~finite)
        self.log_dict({"train/grad_norm": norm, "train/skipped_steps": self.skipped.float()})

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Check the number of skipped steps, every `trainer.log_every_n_steps`."""
        due = self.trainer.global_step % steps_between_logs(self.trainer) == 0
        if due and ends_step(self.trainer, batch_idx):
            self.check_skipped()

    def check_skipped(self) -> None:
        """Raise `Diverged` if more than `max_skipped` steps were skipped.

        The host waits for the device.
        """
        n = self.skipped.item()
        if n > self.max_skipped:
            raise Diverged(
                f"stopped at step {self.trainer.global_step}: the loss or its gradient was not "
                f"finite in {n} steps, which were skipped; optim.max_skipped={self.max_skipped}. "
                "Lower optim.lr, lengthen optim.warmup_steps or set optim.clip_norm, "
                "in a new run_dir"
            )

    def _scaled(self) -> bool:
        """Whether gradients are scaled, as in fp16."""
        return getattr(self.trainer.precision_plugin, "scaler", None) is not None

    def _restore_statistics(self, finite: Tensor) -> None:
        """Restore the running statistics if the step is not finite.

        finite: a scalar that stays on the device, so that the host does not wait for it.
        """
        if self._statistics:
            statistics = torch.where(finite, flattened(self._statistics), self._statistics_before)
            parts = statistics.split([b.numel() for b in self._statistics])
            torch._foreach_copy_(
                self._statistics,
                [p.view_as(b) for p, b in zip(parts, self._statistics, strict=True)],
            )


def check_betas(betas: Sequence[float]) -> None:
    """Refuse anything but two numbers in [0, 1). Raises ValueError."""
    values = list(betas) if isinstance(betas, Sequence) and not isinstance(betas, str) else []
    if len(values) != 2 or not all(is_number(beta) and 0 <= beta < 1 for beta in values):
        raise ValueError(
            f"optim.betas={values or betas} are not two numbers from 0 to less than 1: "
            "give for example optim.betas=[0.9,0.999]"
        )


def check_milestones(milestones: Sequence[float]) -> None:
    """Refuse anything but rising numbers between 0 and 1, of which there may be none.

    Raises ValueError.
    """
    is_list = isinstance(milestones, Sequence) and not isinstance(milestones, str)
    values = list(milestones) if is_list else []
    are_shares = is_list and all(is_number(share) and 0 < share < 1 for share in values)
    if not are_shares or values != sorted(set(values)):
        raise ValueError(
            f"optim.milestones={values or milestones} are not rising shares of the steps, between "
            "0 and 1: give for example optim.milestones=[0.5,0.75,0.9]"
        )


def flattened(tensors: list[Tensor]) -> Tensor:
    """A new vector with the elements of all tensors.

    >>> flattened([torch.ones(2, 1), torch.zeros(1)])
    tensor([1., 1., 0.])
    """
    return torch.cat([tensor.flatten() for tensor in tensors])
