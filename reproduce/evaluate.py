"""Test a trained model again, from its weights alone, and compare with the recorded figures.

python -m reproduce.evaluate outputs/glow_cifar10/20261122-231500-ab12
python -m reproduce.evaluate glow_cifar10/cpu-seed0 data.root=/data/cifar10 noise_samples=16

The model is the folder of a run, an exported folder, a checkpoint, or the name of a recorded run.
The test is that of the run: on the run's test data, in float32, with the noise of its
eval.noise_seed. Statistics of batch norms are estimated anew where the run did so. On the machine
of the run the figures are equal to the last digit. On another one they may differ by rounding, at
most 0.0001 of the figure (or 0.0001, if it is below 1). Figures with statistics that are estimated
anew may differ by 0.001 between a GPU and a CPU, which draw other noise for the estimate.

The exit code is 1 if a figure of the same test differs by more than that. A test with other
settings is not compared with the recorded one.

keys:
  noise_samples=K  also give the importance-weighted bound of K noise samples for each image
                   (test/bpd_iwK), which takes K times as long; the default is the run's
  device=cpu       or cuda; the default is the run's kind of device, if it is here
  quality.n=N      also draw N samples and measure their FID, KID, Inception Score, precision and
                   recall; the default is 0, which measures none. quality.temperature=,
                   quality.reference= and the other keys of the section are those of a recipe
  metrics.inception_weights=FILE
                   the network behind these figures, where it cannot be downloaded
  eval.temperature=0.8
                   of super-resolved images, of which eval.samples=N are drawn for each; they are
                   always measured, with LPIPS by metrics.alexnet_weights=FILE
  data.KEY=...     a setting of the test data, mostly data.root=FOLDER where the images are not
                   where the run had them, data.download=true to fetch them, or
                   data.micro_batch=N to compute N images at once where memory is short
"""

import sys
from pathlib import Path

if not __package__:  # run by its path: take the packages beside this script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, cast

import lightning.pytorch as L
from lightning.pytorch.callbacks import EMAWeightAveraging
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader

import results
from datamodules import make_data
from datamodules.stateless import n_items
from lightning_modules.batch_norm import has_batch_norm
from lightning_modules.callbacks.image_quality import ImageQuality
from lightning_modules.callbacks.paper import comparison_table
from lightning_modules.callbacks.sample_quality import SampleQuality
from lightning_modules.density import REESTIMATED
from reproduce.command import command
from reproduce.config import CONFIGS, ConfigError, arguments, merge, parse, plain
from reproduce.experiment import (
    image_quality,
    papers_of,
    sample_quality,
    silence_lightning,
)
from reproduce.kinds import argument_text
from reproduce.model import StoredModel, stored_model
from reproduce.model_command import (
    MODEL,
    at_least,
    device_of,
    progress_bar,
    read_words,
    repeatable,
)
from reproduce.schema import Schema
from reproduce.stored import read_stored
from reproduce.streams import say

DEFAULTS: dict[str, object] = {"noise_samples": 0, "device": ""}
ROUNDING = 1e-4  # of a figure (of 1, if it is smaller): what another machine may change
OTHER_NOISE = 1e-3  # the same for re-estimated statistics on another kind of device
SAMPLES = ("quality", "metrics", "samples")  # sections on samples and how they are measured
# How keys of a recipe begin that are for super-resolved images, and all that the command takes.
OF_IMAGES = ("eval.", "metrics.alexnet_weights", "metrics.vgg16_weights", "metrics.lpips")
OF_RECIPE = ("data.", "quality.", "metrics.", "eval.temperature=", "eval.samples=")
# Keys of the data that change no figure of a test, if the files are the same.
FREE = ("root", "download", "cache", "num_workers")


class Evaluation(NamedTuple):
    """The figures of a test, by metric, and what they depend on.

    reestimated: the metrics whose batch norms had statistics that were estimated anew.
    content_hash: of the data, where they have one.
    protocol: what the figures of samples depend on, by metric.
    not_measured: why a metric has no figure, by metric.
    """

    figures: dict[str, float]
    reestimated: frozenset[str]
    content_hash: str | None
    protocol: dict[str, dict[str, Any]]
    not_measured: dict[str, str]


class EvaluationBar(L.Callback):
    """A bar with the number of tested images and the time left, on standard error."""

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        loader = cast("DataLoader", trainer.test_dataloaders)
        n = n_items(loader.dataset)
        limit = trainer.num_test_batches[0] * (loader.batch_size or n)
        self.bar = progress_bar(int(min(n, limit)), "images")

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.bar.update(len(batch[0]))

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.bar.close()


def config_of(
    model: StoredModel, noise_samples: int, texts: Mapping[str, str]
) -> tuple[DictConfig, list[str]]:
    """The recipe of a test, and what makes it another test than the model's own.

    Samples are drawn and measured only where `texts` says so. A figure of them is compared by its
    protocol (`compare`), so their settings make no other test.

    noise_samples: 0 for the model's own number. texts: the given settings of the data and of the
    quality of samples, key -> text.
    ConfigError, one line: there is no such key, or it takes no such value.
    """
    config = OmegaConf.create(plain(model.config))
    own = cast("DictConfig", OmegaConf.load(CONFIGS / "base.yaml"))
    for section in SAMPLES:  # which older runs do not have
        config[section] = OmegaConf.merge(own[section], config.get(section) or {})
    config.quality.n = 0
    config.samples.quality_every_n_steps = None
    if "data.name" in texts:
        raise ConfigError(
            f"data.name={texts['data.name']}: a test is on the data of the run, "
            f"{config.data.name}; python -m reproduce.score is for other images"
        )
    if "download" in config.data:
        config.data.download = False  # unless it is given
    schema = Schema(model.experiment)
    schema.use_data(config.data.name)
    for key in texts:
        if key in schema.kinds and OmegaConf.select(config, key) is None:
            OmegaConf.update(config, key, None, force_add=True)
    config = merge(config, texts, schema)
    of_images = [key for key in texts if key.startswith(OF_IMAGES)]
    if of_images and config.data.get("scale") is None:
        raise ConfigError(f"{of_images[0]} has no effect: {model.experiment} enlarges no images")
    others = ("data.", "quality.n", *OF_IMAGES)
    of_samples = [key for key in texts if not key.startswith(others)]
    if of_samples and config.quality.n == 0:
        raise ConfigError(f"{of_samples[0]} has no effect without samples: give quality.n=N, too")
    free = list(FREE)
    if config.trainer.get("limit_test_batches") is None:  # else it decides which images are tested
        free.append("micro_batch")
    changed = [
        f"{key}={argument_text(OmegaConf.select(config, key))}"
        for key in texts
        if key.startswith("data.")
        and key.removeprefix("data.") not in free
        and not is_moved(model, config, key)
        and OmegaConf.select(config, key) != OmegaConf.select(model.config, key)
    ]
    if noise_samples:
        config.eval.noise_samples = noise_samples
    return config, changed


def is_moved(model: StoredModel, config: DictConfig, key: str) -> bool:
    """Whether a key has folders both in the model's recipe and in another one.

    They may have the same images: their hash tells (`other_images`).
    """
    values = [OmegaConf.select(each, key) for each in (model.config, config)]
    return key.endswith("_root") and None not in values


def check_classes(model: StoredModel, names: tuple[str, ...]) -> None:
    """ConfigError, one line: the classes of the data are not those that the flow knows."""
    if names and model.class_names and names != model.class_names:
        raise ConfigError(
            f"the classes of the data are {', '.join(names)}, and those of the model "
            f"{', '.join(model.class_names)}: give another data.root="
        )


def evaluate(model: StoredModel, config: DictConfig, device: str) -> Evaluation:
    """Test a model's weights as a run does. device: "cpu" or "cuda"."""
    data = make_data(seed=config.seed, **config.data)
    module = model.module(data, config)
    module.check_data(data)
    check_classes(model, data.class_names or ())
    measures: list[SampleQuality | ImageQuality] = [sample_quality(config), *image_quality(config)]
    callbacks: list[L.Callback] = [EvaluationBar(), *measures]
    is_averaged = (config.get("ema") or {}).get("decay") is not None
    if is_averaged:  # the objective then estimates batch-norm statistics anew for all figures
        callbacks.append(EMAWeightAveraging(use_buffers=False, decay=config.ema.decay))
    silence_lightning()
    with without_device_lines():
        trainer = L.Trainer(
            accelerator={"cuda": "gpu", "cpu": "cpu"}[device],
            devices=1,
            precision="32-true",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=callbacks,
            limit_test_batches=config.trainer.get("limit_test_batches"),
            deterministic=config.trainer.get("deterministic", False),
            use_distributed_sampler=False,
            inference_mode=not module.needs_autograd,
        )
    try:
        trainer.test(module, datamodule=data, verbose=False)
    except SystemExit as end:  # how Lightning ends after a KeyboardInterrupt
        raise KeyboardInterrupt from end
    figures = {key: value.item() for key, value in trainer.callback_metrics.items()}
    is_anew = is_averaged and has_batch_norm(module.trained)
    reestimated = frozenset(key for key in figures if is_anew or key.endswith(REESTIMATED))
    content_hash = getattr(data, "content_hash", None)
    protocol: dict[str, dict[str, Any]] = {}
    not_measured: dict[str, str] = {}
    for measure in measures:
        protocol |= measure.protocol
        not_measured |= measure.not_measured
    return Evaluation(figures, reestimated, content_hash, protocol, not_measured)


@contextlib.contextmanager
def without_device_lines() -> Iterator[None]:
    """Leave out Lightning's lines about devices that are there and are not used."""
    log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(level)


def difference(
    key: str, evaluation: Evaluation, recorded: float | None, tolerance: float
) -> tuple[str, bool]:
    """How far a figure is from the recorded one, as a line, and whether it is close enough.

    recorded: None, if it was not finite. tolerance: of the figure, or of 1 if that is larger.
    """
    value = evaluation.figures[key]
    if recorded is None or not math.isfinite(value):
        is_equal = recorded is None and not math.isfinite(value)
        text = "not finite" if recorded is None else f"{recorded:.9g}"
        return f"{key}: {value:.9g}, recorded {text}", is_equal
    line = f"{key}: {value:.9g}, recorded {recorded:.9g}"
    if value == recorded:
        return f"{line}: equal to the last digit", True
    gap = value - recorded
    is_close = abs(gap) <= tolerance * max(1.0, abs(recorded))
    verdict = "within rounding" if is_close else "more than rounding"
    return f"{line}: {gap:+.2g}, {verdict}", is_close


def compare(evaluation: Evaluation, result: Mapping[str, Any], device: str) -> tuple[str, bool]:
    """The lines that compare a test with the recorded figures, and whether all are close enough.

    Figures of samples are compared where they were measured in the same way.

    result: the recorded one. device: of this test.
    """
    recorded = result["metrics"]
    protocols = result.get("protocol") or {}
    was_on_cpu = "threads" in str(result.get("device"))
    same_kind = was_on_cpu == (device == "cpu")
    lines = []
    all_close = True
    for key in sorted(evaluation.figures.keys() & recorded.keys()):
        if key in evaluation.protocol and evaluation.protocol[key] != protocols.get(key):
            lines.append(
                f"{key}: not compared with the recorded figure, which has another protocol"
            )
            continue
        tolerance = ROUNDING
        if key in evaluation.reestimated and not same_kind:
            tolerance = OTHER_NOISE
        line, is_close = difference(key, evaluation, recorded[key], tolerance)
        lines.append(line)
        all_close = all_close and is_close
    return "\n".join(lines), all_close


def table(config: DictConfig, evaluation: Evaluation, result: Mapping[str, Any] | None) -> str:
    """The table at the end of a run, with the figures of this test."""
    content = {
        "experiment": config.experiment,
        "metrics": evaluation.figures,
        "papers": papers_of(config),
        "protocol": evaluation.protocol,
        "not_measured": evaluation.not_measured,
        "config": plain(config),
        "budget": (result or {}).get("budget"),
    }
    return comparison_table(content | results.compare_all(content))


def other_images(evaluation: Evaluation, result: Mapping[str, Any]) -> list[str]:
    """What makes the test another one than the recorded: other images, or nothing."""
    recorded = (result.get("data") or {}).get("sha256")
    if recorded is None or recorded == evaluation.content_hash:
        return []
    return ["other images"]


@command
def main(argv: list[str] | None = None) -> None:
    """Test and compare; one line and exit code 1 for a mistake, or for another figure."""
    words = arguments(argv)
    if {"--help", "-h"} & set(words):
        say((__doc__ or "").strip())
        return
    is_data = [word.startswith(OF_RECIPE) and "=" in word for word in words]
    texts = parse([word for word, belongs in zip(words, is_data, strict=True) if belongs])
    rest = [word for word, belongs in zip(words, is_data, strict=True) if not belongs]
    [name], options = read_words(rest, [MODEL], DEFAULTS)
    at_least(options, noise_samples=0)
    model = stored_model(read_stored(name))
    config, changed = config_of(model, options.noise_samples, texts)
    default = "cpu" if config.trainer.accelerator == "cpu" else ""
    device = device_of(options.device or default)
    with repeatable("nothing is written, the same command tests again"):
        evaluation = evaluate(model, config, device)
    say(f"{table(config, evaluation, model.result)}\n")
    if model.result is None:
        say("no figures of these weights are recorded: they were not tested in their run")
        return
    changed += other_images(evaluation, model.result)
    if changed:
        say(f"not compared with the recorded figures: {', '.join(changed)} in this test")
        return
    lines, all_close = compare(evaluation, model.result, device)
    say(lines)
    if not all_close:
        raise ConfigError(
            "these are not the recorded figures: the images of the run (data.root=), its commit "
            f"({model.commit}) or its weights were others"
        )


if __name__ == "__main__":
    main()
