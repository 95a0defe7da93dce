"""What surrounds a model's own work costs: fault tolerance in a step, and the loop of evaluation.

python -m benchmarks.overhead                    # RealNVP of preset=cpu on photographs
torchrun --standalone --nproc-per-node=2 -m benchmarks.overhead trainer.devices=2
python -m benchmarks.overhead evaluation         # the validations of the same run

Every second step is "bare": it has Lightning's own clipping and signal broadcast instead of our
check that everything is finite, exchange of stop flags and copies of running statistics. The
command prints the median time of bare and of guarded steps within this one run and their ratio,
and the time to write a checkpoint, as a share of a step.

With the word `evaluation` each step is followed by a validation, and each validation by forward
passes alone: log p(x) of the same batches, which are already dequantised and on the device. (In
every second round they come before it.) The validation also loads the data, draws their noise,
keeps the means and writes the curve. The command prints the median time of both and the median of
their ratios, which should be at most 1.10. The validation before training does not count.
"""

import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig
from torch import Tensor, nn

from datamodules import make_data
from lightning_modules.callbacks.preemption import Preemption
from lightning_modules.density import DensityModule
from lightning_modules.lightning_internals import broadcast_no_signals, broadcast_signals
from lightning_modules.precision import evaluation
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
EVALUATION = [  # in the place of those settings, with the word `evaluation`
    "trainer.limit_val_batches=null",
    "trainer.val_check_interval=1",
    "trainer.max_steps=20",
    "data.n_val=512",
    "checkpoint.every_n_steps=100000",
    "samples.every_n_steps=100000",
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


class ForwardAlone(L.Callback):
    """Times every validation of a run, and forward passes alone on the same batches beside it."""

    def __init__(self) -> None:
        self.inputs: list[tuple] = []  # of the flow, for each batch
        self.n_images = 0  # in a validation
        self.seconds: dict[str, list[float]] = {"loop": [], "forward": []}
        self.started = 0.0

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step % 2 == 1:
            self._forward(pl_module)
        self.started = now(pl_module)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.sanity_checking:
            sample = cast(DensityModule, pl_module).input_of(batch)
            self.inputs.append(sample.arguments)
            self.n_images += len(sample.x)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        seconds = now(pl_module) - self.started
        if trainer.sanity_checking:
            return
        self.seconds["loop"].append(seconds)
        if trainer.global_step % 2 == 0:
            self._forward(pl_module)

    def _forward(self, module: L.LightningModule) -> None:
        started = now(module)
        with evaluation(module.device.type):
            for arguments in self.inputs:
                cast(DensityModule, module).flow.log_prob(*arguments)
        self.seconds["forward"].append(now(module) - started)


def now(module: L.LightningModule) -> float:
    """Seconds, once the device of a module has done all of its work."""
    if module.device.type == "cuda":
        torch.cuda.synchronize(module.device)
    return time.perf_counter()


@command
def main(argv: list[str] | None = None) -> None:
    """Measure what the words ask for, and print it."""
    words = arguments(argv)
    if "evaluation" in words:
        words.remove("evaluation")
        time_evaluation(override(override(SETTINGS, EVALUATION), words))
    else:
        time_steps(override(SETTINGS, words))


def train(words: list[str], callback: L.Callback) -> tuple[DictConfig, L.Trainer]:
    """Train as the words say, with one more callback."""
    if not any(word.startswith("run_dir=") for word in words):
        words = [*words, f"run_dir={tempfile.mkdtemp()}"]
    config = load_config("realnvp_cifar10", __doc__ or "", words)
    data = make_data(seed=config.seed, **config.data)
    module = DensityModule.of(config, make_flow(config, data.shape), data)
    trainer = make_trainer(config, module, callback)
    fit(config, trainer, module, data)
    return config, trainer


def time_evaluation(words: list[str]) -> None:
    """Print how much longer validations take than forward passes alone."""
    timed = ForwardAlone()
    _, trainer = train(words, timed)
    loop, forward = (statistics.median(timed.seconds[kind]) for kind in ("loop", "forward"))
    pairs = zip(timed.seconds["loop"], timed.seconds["forward"], strict=True)
    ratio = statistics.median(validation / alone for validation, alone in pairs)
    rank_zero_only(print)(
        f"{trainer.world_size} rank(s), {len(timed.seconds['loop'])} validations of "
        f"{timed.n_images} images a rank: {loop:.4f} s, forward passes alone {forward:.4f} s, "
        f"ratio {ratio:.4f}"
    )


def time_steps(words: list[str]) -> None:
    """Train with every second step bare, and print how much longer the others take."""
    alternate = Alternate()
    config, trainer = train(words, alternate)
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
