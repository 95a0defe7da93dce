"""Whether an affine Glow stays finite on CIFAR-10, over many seeds or over many steps.

python -m benchmarks.stability short           # 20 seeds, 32 steps a level, 300 training steps
python -m benchmarks.stability long            # 3 seeds, 4 steps a level, 10,000 training steps
python -m benchmarks.stability long-authors    # `long` with the authors' scales, down to 0
python -m benchmarks.stability short seeds=0,1 --json FILE trainer.max_steps=100 data.root=data

A public Glow was seen to jump from 6.8 to 1959 bits/dim in its second step, without a warm-up from
0; others become NaN late in training. All three kinds are glow_cifar10 with the recipe's optimizer,
learning rate and warm-up, but narrower networks and smaller batches. After training each flow is
inverted, on test images and on images of noise, which are far from the data.

FILE is written after every seed, and a seed that it holds is not run again. A run ends early if too
many steps were not finite; its row then has fewer steps. The results page shows
results/stability/*.json.
"""

import contextlib
import functools
import json
import math
import tempfile
from collections.abc import Callable, Sized
from pathlib import Path
from typing import cast

import lightning.pytorch as L
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from benchmarks.json_file import take_json
from datamodules import make_data
from datamodules.stateless import StatelessDataModule
from flows.glow import Glow
from lightning_modules.callbacks.samples import finite_share
from lightning_modules.density import DensityModule
from lightning_modules.precision import full_float32
from lightning_modules.stopping import TRY_AGAIN, Diverged, RunStopped
from reproduce import glow_cifar10
from reproduce.arguments import parse_seeds, settings
from reproduce.config import ConfigError, arguments, compose, override, parse
from reproduce.experiment import command, fit, load_config, make_trainer
from reproduce.provenance import git_state, machine
from reproduce.streams import say
from results import stability
from results.files import portable, write

RECIPE = ["optim.warmup_steps=980"]  # preset=cpu shortens the warm-up; this is the recipe's
QUIET = [
    "preset=cpu",
    "logger.name=none",
    "trainer.limit_val_batches=0",
    "checkpoint.select=last",
    "samples.n=1",
    "samples.temperatures=[0.7]",
    "samples.every_n_steps=1000000",
    "checkpoint.every_n_steps=100000",
]
SMALL = ["flow.depth=4", "flow.hidden_channels=16", "data.batch_size=8", "trainer.max_steps=10000"]
KINDS = {
    "short": (
        range(20),
        ["flow.depth=32", "flow.hidden_channels=8", "data.batch_size=4", "trainer.max_steps=300"],
    ),
    "long": (range(3), [*SMALL, "flow.min_scale=0.5"]),
    "long-authors": (range(1), SMALL),
}
EVERY = {"short": 10, "long": 100, "long-authors": 100}  # steps between two measurements
OURS = ("seed", "run_dir", "resume")  # keys that this command decides
N_IMAGES = 256
N_SAMPLES = 256
Measure = Callable[..., float]


class FixedBatch(L.Callback):
    """Measures bits/dim of the same images with the same noise, before and during training.

    every: steps between two measurements.
    """

    def __init__(self, every: int, data: StatelessDataModule) -> None:
        self.every = every
        self.data = data
        self.bpd: list[float] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        module = cast(DensityModule, pl_module)
        self.x = fixed_images(self.data.val, module)
        self._measure(module)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        if trainer.global_step % self.every == 0:
            self._measure(cast(DensityModule, pl_module))

    @torch.no_grad()
    def _measure(self, module: DensityModule) -> None:
        with full_float32(module.device.type):
            self.bpd.append(module.loss_per_datum(module.flow.log_prob(self.x)).mean().item())


def fixed_images(data: Dataset, module: DensityModule) -> Tensor:
    """The first images of a split, dequantised with their own evaluation noise, (256, C, H, W)."""
    n = min(N_IMAGES, len(cast(Sized, data)))
    images, indices = default_collate([data[0, i][:2] for i in range(n)])
    return module.input_of([images, indices]).x.to(module.device)


def shared_arguments(kind: str, overrides: list[str]) -> list[str]:
    """The arguments that all runs of a command share."""
    return override([*QUIET, *RECIPE, *KINDS[kind][1]], overrides)


def model_entries(config: DictConfig) -> dict:
    """The entries of a row that describe the model."""
    return {
        "min_scale": config.flow.min_scale,
        "depth": config.flow.depth,
        "hidden_channels": config.flow.hidden_channels,
        "batch_size": config.data.batch_size,
        "optim": OmegaConf.to_container(config.optim),
    }


def train(kind: str, seed: int, folder: Path, overrides: list[str], every: int) -> dict:
    """Train one seed and measure it.

    Returns its row: bits/dim of the fixed images, skipped steps, the largest errors of round trips
    in grey levels, the share of samples that are finite, and the model.
    """
    words = [*shared_arguments(kind, overrides), f"seed={seed}", f"run_dir={folder}"]
    config = load_config(glow_cifar10.__file__, __doc__, words)
    data = make_data(seed=config.seed, **config.data)
    flow = glow_cifar10.make_flow(config, data.shape)
    module = DensityModule.of(config, flow, data)
    watch = FixedBatch(every, data)
    trainer = make_trainer(config, module, watch)
    with contextlib.suppress(Diverged):  # a run that diverges is a result, too
        fit(config, trainer, module, data)
    flow.eval()
    commit, dirty = git_state()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), full_float32(module.device.type):
        images = fixed_images(data.test, module)
        noise = torch.rand(images.shape, generator=generator).to(images)
        finite = {f"finite_T{t:g}": finite_samples(flow, t, generator) for t in (0.7, 1.0)}
        errors = {"images": round_trip(flow, images), "noise": round_trip(flow, noise)}
    return {
        "seed": seed,
        "steps": trainer.global_step,
        "skipped_steps": module.skipped.item(),
        "bpd_every": every,
        "bpd": watch.bpd,
        # PyTorch's maximum is NaN if one of the values is.
        "highest_rise": torch.tensor(watch.bpd, dtype=torch.float64).max().item() - watch.bpd[0],
        "round_trip_grey_levels": errors,
        **finite,
        **model_entries(config),
        "precision": config.trainer.precision,
        "device": machine(trainer)["device"],
        "commit": commit,
        "dirty": dirty,
    }


def or_nan(measure: Measure) -> Measure:
    """Let a measurement return NaN if a matrix of the flow has no inverse."""

    @functools.wraps(measure)
    def wrapped(*arguments: object) -> float:
        try:
            return measure(*arguments)
        except torch.linalg.LinAlgError:
            return math.nan

    return wrapped


@or_nan
def round_trip(flow: Glow, x: Tensor) -> float:
    """The largest |f^-1(f(x)) - x| over all pixels, in grey levels of 8 bits."""
    return 256 * (flow.inverse(flow(x)[0])[0] - x).abs().max().item()


@or_nan
def finite_samples(flow: Glow, temperature: float, generator: torch.Generator) -> float:
    """The share of samples that are finite."""
    return finite_share(flow.sample(N_SAMPLES, temperature, generator=generator))


@command
def main(argv: list[str] | None = None) -> list[dict] | None:
    """Run the seeds that FILE lacks. Returns all rows."""
    kind, *words = arguments(argv) or [""]
    if {"--help", "-h"} & {kind, *words}:
        say((__doc__ or "").strip())
        return None
    if kind not in KINDS:
        raise ConfigError(f"'{kind}' is no kind: give one of {', '.join(KINDS)}")
    path, seeds, overrides = read(words, list(KINDS[kind][0]))
    content = {"kind": kind, "overrides": portable(overrides), "runs": []}
    if path is not None and path.is_file():
        content = stored(path, kind, overrides)
    for seed in seeds:
        if seed in [row["seed"] for row in content["runs"]]:
            continue
        try:
            with tempfile.TemporaryDirectory() as folder:
                row = train(kind, seed, Path(folder) / "run", overrides, EVERY[kind])
        except RunStopped as stop:
            if stop.code == TRY_AGAIN:  # the run's own message names its folder, which is gone
                stop.message = f"stopped in seed {seed}"
                if path is not None:
                    stop.message += f": repeat the command, {path} keeps finished seeds"
            raise
        content["runs"].append(portable(row))  # NaN as null
        shown = {k: v for k, v in row.items() if k not in ("bpd", "optim")}
        say(json.dumps({**shown, "last_bpd": row["bpd"][-1]}))
        if path is not None:
            write(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
    return content["runs"]


def stored(path: Path, kind: str, overrides: list[str]) -> dict:
    """The content of FILE.

    ConfigError, ValueError: another command has written it, or its runs had another model.
    """
    content = stability.read(path)
    same_settings = settings(content["overrides"], OURS) == settings(overrides, OURS)
    if content["kind"] != kind or not same_settings:
        command_line = " ".join([content["kind"], *content["overrides"]])
        raise ConfigError(f"{path} holds {command_line}: give another file")
    recipe = glow_cifar10.__name__.split(".")[-1]
    model = model_entries(compose(recipe, shared_arguments(kind, overrides)))
    change = stability.changes(stability.model(content["runs"][0]), stability.model(model))
    if change:
        raise ConfigError(
            f"{path} holds runs with {change[0]}, not with {change[1]}: give another file"
        )
    return content


def read(words: list[str], seeds: list[int]) -> tuple[Path | None, list[int], list[str]]:
    """Split the words into file, seeds, and the overrides of all runs. ConfigError: a mistake."""
    path, others = take_json(words)
    overrides = []
    for key, value in parse(others).items():
        if key == "seeds":
            seeds = parse_seeds(value)
        elif key in OURS:
            raise ConfigError(f"{key} is not to be given here: give seeds=0,1 and --json FILE")
        else:
            overrides.append(f"{key}={value}")
    return path, seeds, overrides


if __name__ == "__main__":
    main()
