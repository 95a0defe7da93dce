"""What fault tolerance costs: the share of a step spent on skipping, stopping and saving.

python -m benchmarks.overhead                    # RealNVP of preset=cpu on photographs
torchrun --standalone --nproc-per-node=2 -m benchmarks.overhead trainer.devices=2

Every second step is "bare": it has Lightning's own clipping and signal broadcast instead of our
check that everything is finite, exchange of stop flags and copies of running statistics. The
command prints the median time of bare and of guarded steps within this one run and their ratio,
and the time to write a checkpoint, as a share of a step.
"""

import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import cast

import lightning.pytorch as L
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn

from datamodules import make_data
from lightning_modules.callbacks.preemption import Preemption
from lightning_modules.density import DensityModule
from lightning_modules.lightning_internals import broadcast_no_signals, broadcast_signals
from reproduce.config import arguments, override
from reproduce.experiment import command, fit, load_config, make_trainer
from reproduce.realnvp_cifar10 import make_flow

STEPS = 240
WARM_UP = 40
N_CHECKPOINTS = 5
EVERY = 500  # steps between two checkpoints
SETTINGS = [
    "preset=cpu",
    "data.name=photos",
    "logger.name=none",
    f"trainer.max_steps={STEPS}",
    "eval.bn_images=0",
    "trainer.limit_val_batches=0",
    "checkpoint.select=last",
    "samples.n=1",
    "trainer.log_every_n_steps=50",
]


class Alternate(L.Callback):
    """Times every step, from its start to that of the next, and makes every second one bare."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {"guarded": [], "bare": []}
        self.kind = "guarded"  # of the step that is running
        self.last: float | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.agree = Preemption._agree

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        if self.last is not None and trainer.global_step > WARM_UP:
            self.seconds[self.kind].append(now - self.last)
        if trainer.global_step % 2 == 1:
            self._bare(trainer, pl_module)
        else:
            self._guarded(trainer, pl_module)
        self.last = time.perf_counter()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._guarded(trainer, pl_module)

    def _bare(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Replace the methods of the guard, on this module alone."""
        self.kind = "bare"
        vars(module)["finite_or_nan"] = _unchanged
        vars(module)["on_train_batch_start"] = _nothing
        vars(module)["configure_gradient_clipping"] = partial(_clip, cast(DensityModule, module))
        setattr(Preemption, "_agree", _nothing)  # noqa: B010 - mypy refuses to assign a method
        if trainer.world_size > 1:
            broadcast_signals(trainer)

    def _guarded(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.kind = "guarded"
        for name in ("finite_or_nan", "on_train_batch_start", "configure_gradient_clipping"):
            vars(module).pop(name, None)
        setattr(Preemption, "_agree", self.agree)  # noqa: B010
        if trainer.world_size > 1:
            broadcast_no_signals(trainer)


def _unchanged(loss: Tensor) -> Tensor:
    """Replaces the check whether a loss is finite."""
    return loss


def _nothing(*arguments: object, **keywords: object) -> None:
    """Replaces a hook."""


def _clip(module: DensityModule, *arguments: object, **keywords: object) -> None:
    """Clip as Lightning does. The recipe sets `optim.clip_norm`."""
    norm = nn.utils.clip_grad_norm_(module.flow.parameters(), cast(float, module.clip_norm))
    module.log("train/grad_norm", norm)


@command
def main(argv: list[str] | None = None) -> None:
    """Train with every second step bare, and print how much longer the others take."""
    words = override(SETTINGS, arguments(argv))
    if not any(word.startswith("run_dir=") for word in words):
        words.append(f"run_dir={tempfile.mkdtemp()}")
    config = load_config("realnvp_cifar10", __doc__, words)
    data = make_data(seed=config.seed, **config.data)
    module = DensityModule.of(config, make_flow(config, data.shape), data)
    alternate = Alternate()
    trainer = make_trainer(config, module, alternate)
    fit(config, trainer, module, data)
    bare, guarded = (statistics.median(alternate.seconds[kind]) for kind in ("bare", "guarded"))
    start = time.perf_counter()
    for number in range(N_CHECKPOINTS):
        trainer.save_checkpoint(Path(config.run_dir, "checkpoints", f"timed-{number}.ckpt"))
    saving = (time.perf_counter() - start) / N_CHECKPOINTS
    n_steps = len(alternate.seconds["bare"])
    rank_zero_only(print)(
        f"{trainer.world_size} rank(s), {n_steps} steps each: bare {bare:.4f} s, "
        f"guarded {guarded:.4f} s, ratio {guarded / bare:.4f}; a checkpoint takes {saving:.3f} s, "
        f"one in {EVERY} steps {saving / EVERY / bare:.4f} of a step"
    )


if __name__ == "__main__":
    main()
