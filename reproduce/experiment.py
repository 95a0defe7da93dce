"""The only glue: a config becomes a trainer, a trainer a run folder, a run folder a result."""

import contextlib
import copy
import functools
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from omegaconf import DictConfig, OmegaConf

import results
from lightning_modules.callbacks.checkpoints import StepCheckpoint
from lightning_modules.callbacks.curve import Curve
from lightning_modules.callbacks.paper import PaperComparison, comparison_table
from lightning_modules.callbacks.progress import Progress
from lightning_modules.callbacks.samples import Samples
from lightning_modules.density import DensityModule
from reproduce.config import ConfigError, arguments, compose, describe
from reproduce.loggers import make_logger
from reproduce.provenance import Provenance, best_precision, machine
from reproduce.run_folder import (
    check_checkpoint,
    check_run_dir,
    newest_checkpoint,
    open_folder,
    read_checkpoint,
    run_id,
    selected_weights,
)
from results.runs import write


def command(main):
    """Turn a user's mistake into one line and exit code 1.

    Mistakes: a ConfigError, a setting that Lightning refuses, an OSError (missing file, full disk), a ValueError (an
    impossible value, whoever finds it). PAPERFLOWS_TRACEBACK=1 shows where it was raised; other errors always do.
    """

    @functools.wraps(main)
    def wrapped(argv=None):
        try:
            return main(argv)
        except (ConfigError, MisconfigurationException, OSError, ValueError) as error:
            if os.environ.get("PAPERFLOWS_TRACEBACK"):
                raise
            sys.exit(f"error: {' '.join(str(error).split())}")
        except KeyboardInterrupt:
            sys.exit("stopped")
        finally:
            if "wandb" in sys.modules:
                sys.modules["wandb"].finish()

    return wrapped


def load_config(script: str, doc: str, argv: list[str] | None) -> DictConfig:
    """The resolved, read-only config of a script, with its run folder decided and the random generators seeded.

    Answers --help and --print-config itself, and ends with 0 where the run is already finished.
    """
    experiment, given = Path(script).stem, arguments(argv)
    if {"--help", "-h"} & set(given):
        print(describe(experiment, doc))
        sys.exit(0)
    config = compose(experiment, [a for a in given if a != "--print-config"])
    L.seed_everything(config.seed, verbose=False)
    if config.trainer.precision == "auto":
        config.trainer.precision = best_precision(config.trainer.accelerator)
    if "--print-config" in given:
        print(OmegaConf.to_yaml(config, resolve=True), end="")
        sys.exit(0)
    if config.trainer.accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise ConfigError(
            f"trainer.accelerator={config.trainer.accelerator}, but there is no GPU here: give preset=cpu"
        )
    if config.trainer.val_check_interval < 1:
        raise ConfigError(f"trainer.val_check_interval={config.trainer.val_check_interval} are steps: give at least 1")
    if config.checkpoint.select == "best" and not _validates(config):
        given = f"data.n_val={config.data.n_val} trainer.limit_val_batches={config.trainer.limit_val_batches}"
        raise ConfigError(f"{given} leaves nothing to choose the best weights by: add checkpoint.select=last")
    if config.trainer.limit_test_batches == 0:
        raise ConfigError("trainer.limit_test_batches=0 tests nothing: give at least 1, or null for all")
    if config.resume and not config.run_dir and "SLURM_JOB_ID" not in os.environ:
        raise ConfigError("resume=auto needs to know where: add run_dir=FOLDER")
    config.run_dir = str(config.run_dir or Path("outputs") / experiment / run_id())
    if rank_zero_only.rank == 0 or Path(config.run_dir, "result.json").is_file():
        check_run_dir(config)
    OmegaConf.set_struct(config, False)
    config.overrides = [a for a in given if not a.startswith(("run_dir=", "resume="))]
    OmegaConf.resolve(config)
    OmegaConf.set_readonly(config, True)
    return config


def _validates(config: DictConfig) -> bool:
    return bool(config.data.n_val) and config.trainer.limit_val_batches != 0


def make_trainer(config: DictConfig, module: DensityModule, *extra: L.Callback) -> L.Trainer:
    """A Trainer with everything that a run of this house has; makes the run folder and its log."""
    folder, batch_size, paper = Path(config.run_dir), config.data.batch_size, paper_of(config)
    settings = OmegaConf.to_container(config.trainer)
    settings.pop("compile")
    if settings["max_steps"] > 0:  # at least one validation, so that there are best weights
        settings["val_check_interval"] = min(settings["val_check_interval"], settings["max_steps"])
    if type(settings["max_epochs"]) not in (int, type(None)):
        raise ConfigError(f"trainer.max_epochs={settings['max_epochs']} is no number of epochs: give an int")
    interval = settings["val_check_interval"]
    callbacks = [
        Provenance(config),
        Curve(folder, batch_size, interval, paper),
        Samples(folder / "samples", **config.samples),
        PaperComparison(paper),
        Progress(batch_size, enabled=sys.stderr.isatty()),
        *extra,
        *_checkpoints(config, module, interval),
    ]
    if config.ema.decay is not None:
        if not isinstance(config.ema.decay, float) or not 0 <= config.ema.decay <= 1:
            raise ConfigError(f"ema.decay={config.ema.decay} is not between 0 and 1: give for example 0.999")
        callbacks.append(EMAWeightAveraging(use_buffers=False, decay=config.ema.decay))
    open_folder(folder)
    logger = make_logger(config)
    if logger:
        callbacks.append(LearningRateMonitor("step"))
    _hush()
    try:
        return L.Trainer(
            **settings,
            callbacks=callbacks,
            logger=logger,
            default_root_dir=folder,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=-1,  # all of it: the curve's row at step 0
            use_distributed_sampler=False,  # ours shards without padding
            enable_model_summary=False,
        )
    except (TypeError, AssertionError) as error:  # how Lightning answers to a value of the wrong type
        given = " ".join(f"trainer.{key}={value}" for key, value in settings.items() if value is not None)
        raise ConfigError(f"Lightning does not take {given}: {error}") from error


def _checkpoints(config: DictConfig, module: DensityModule, interval: int) -> list[ModelCheckpoint]:
    """The best by validation, then the newest, which so holds the best's score."""
    every, folder = config.checkpoint.every_n_steps, Path(config.run_dir, "checkpoints")
    same = {"dirpath": folder, "auto_insert_metric_name": False, "enable_version_counter": False}
    if not _validates(config):
        return [StepCheckpoint(None, every_n_train_steps=every, **same)]
    best = ModelCheckpoint(filename="best", monitor=f"val/{module.metric}", **same)
    return [best, StepCheckpoint(interval, every_n_train_steps=every, **same)]


@contextlib.contextmanager
def _resumable(config: DictConfig, trainer: L.Trainer) -> Iterator[None]:
    """After Ctrl-C, on which Lightning shuts down in order and exits, say how to go on."""
    try:
        yield
    except SystemExit:
        again = " ".join([f"python reproduce/{config.experiment}.py", *config.overrides, f"run_dir={config.run_dir}"])
        sys.exit(f"stopped at step {trainer.global_step}; go on with: {again} resume=auto")


def _hush() -> None:
    """Silence what Lightning says in every run and nobody can act on."""
    for text in ("does not have many workers", "srun. command is available", "LeafSpec", "exists and is not empty"):
        warnings.filterwarnings("ignore", f".*{text}.*")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_no_tip)
    logging.getLogger("lightning.pytorch.trainer.connectors.checkpoint_connector").setLevel(logging.WARNING)


def _no_tip(record: logging.LogRecord) -> bool:
    return "Tip:" not in record.getMessage()


def fit(config: DictConfig, trainer: L.Trainer, module: L.LightningModule, data: L.LightningDataModule) -> None:
    """Train, from the newest checkpoint of the run folder where resume=auto finds one."""
    checkpoint = newest_checkpoint(Path(config.run_dir)) if config.resume == "auto" else None
    if checkpoint is not None:
        check_checkpoint(checkpoint, config)
        rank_zero_info(f"going on from {checkpoint}")
    elif config.preset is None and not torch.cuda.is_available():
        _say_how_long(config, module)
    n_parameters = sum(p.numel() for p in module.flow.parameters())
    rank_zero_info(
        f"{config.experiment}: {n_parameters:,} parameters, {config.trainer.precision}, run {config.run_dir}"
    )
    if config.trainer.compile:
        module.flow.compile()
    with _resumable(config, trainer):
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    last = Path(config.run_dir) / "checkpoints" / f"step-{trainer.global_step:08d}.ckpt"
    if not last.is_file():
        trainer.save_checkpoint(last)


def _say_how_long(config: DictConfig, module: L.LightningModule) -> None:
    """One line, measured: how long the whole budget would take on this machine without a GPU."""
    if config.budget.images is None or len(module.flow.shape) != 3:
        return
    flow, x = copy.deepcopy(module.flow), torch.rand(4, *module.flow.shape)
    start = time.monotonic()
    with torch.autocast("cpu", torch.bfloat16, enabled=config.trainer.precision == "bf16-mixed"):
        flow.log_prob(x).mean().backward()
    days = (time.monotonic() - start) / len(x) * config.budget.images / 86_400
    rank_zero_info(
        f"No GPU here: the paper's recipe ({config.budget.images:,} images) would take about {days:,.0f} days; "
        "preset=cpu is a smaller model for two cores"
    )


def paper_of(config: DictConfig) -> dict | None:
    """The claim beside which a run is shown; comparable where data and test split are the claim's."""
    if config.paper is None:
        return None
    claim = results.load_claim(config.paper)
    comparable = config.data.name == claim["data"] and config.trainer.limit_test_batches is None
    return {"claim": config.paper, "metric": claim["metric"], "value": claim["value"], "comparable": comparable}


def record(config: DictConfig, trainer: L.Trainer, module: L.LightningModule, data: L.LightningDataModule) -> dict:
    """Test the selected weights, write result.json, print the table. Returns the result (schema: results/runs.py)."""
    folder, images = Path(config.run_dir), trainer.global_step * config.data.batch_size
    curve, samples, provenance = (_callback(trainer, kind) for kind in (Curve, Samples, Provenance))
    seconds = round(curve.seconds, 1)
    weights = selected_weights(folder, config.checkpoint.select)
    checkpoint = read_checkpoint(weights)
    module.load_state_dict(checkpoint["state_dict"])
    with _resumable(config, trainer):
        trainer.test(module, datamodule=data, verbose=False, weights_only=True)
    tested = {key: value.item() for key, value in trainer.callback_metrics.items()}
    budget, wandb_run = config.budget.images, getattr(trainer.logger, "experiment", None)
    result = {
        "experiment": config.experiment,
        "run": folder.name,
        "preset": config.preset,
        "overrides": list(config.overrides),
        "metrics": {**samples.finite, **curve.validated(module.metric, weights.stem == "best"), **tested},
        "paper": paper_of(config),
        "budget": budget and {"images": images, "of": budget, "fraction": images / budget, "source": "ours"},
        "seed": config.seed,
        "commit": provenance.commit,
        "dirty": provenance.dirty,
        "config": OmegaConf.to_container(config),
        **machine(trainer),
        "precision": config.trainer.precision,
        "deterministic": bool(config.trainer.deterministic),
        "images": images,
        "seconds": seconds,
        "n_train": data.n_train,
        "parameters": sum(p.numel() for p in module.flow.parameters()),
        "checkpoint": str(weights.relative_to(folder)),
        "tested": {
            "weights": "raw" if config.ema.decay is None else f"averaged with decay {config.ema.decay}",
            "chosen": weights.stem.partition("-")[0],
            "step": checkpoint["global_step"],
        },
        "wandb_url": None if getattr(wandb_run, "offline", True) else wandb_run.url,
        "weights": None,
        "suspect": None,
    }
    result |= results.compare(result)
    if trainer.is_global_zero:
        write(folder / "result.json", json.dumps(result, indent=1))
        _say_what_there_is(folder, result)
    return result


def _callback(trainer: L.Trainer, kind: type):
    return next(c for c in trainer.callbacks if isinstance(c, kind))


def _say_what_there_is(folder: Path, result: dict) -> None:
    print(f"\n{comparison_table(result)}\n")
    pictures = sorted((folder / "samples").glob("samples-*.png"))[-1:] + sorted(folder.glob("*.png"))
    for path in [*pictures, folder / "result.json"]:
        print(path)
