"""What every script shares: load the config, make a trainer, train, test and record the result."""

import copy
import json
import logging
import math
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import lightning.pytorch as L
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateMonitor
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info
from omegaconf import DictConfig, ListConfig, OmegaConf

import results
from datamodules.checks import expand_home
from datamodules.image_cache import default_cache
from datamodules.samplers import n_micro_batches
from datamodules.stateless import StatelessDataModule
from flows.recompute import recompute
from lightning_modules.batch_norm import has_batch_norm
from lightning_modules.callbacks.checkpoints import Checkpoints
from lightning_modules.callbacks.curve import Curve
from lightning_modules.callbacks.image_quality import ImageQuality
from lightning_modules.callbacks.initialization import Initialization
from lightning_modules.callbacks.paper import PaperComparison, comparison_table
from lightning_modules.callbacks.preemption import Preemption
from lightning_modules.callbacks.progress import Progress, lines_above_bar
from lightning_modules.callbacks.sample_quality import SampleQuality
from lightning_modules.callbacks.samples import Samples
from lightning_modules.callbacks.throughput import Throughput
from lightning_modules.checkpoint_io import SafeCheckpointIO
from lightning_modules.lightning_internals import send_no_buffers, set_signal_handlers_with
from lightning_modules.objective import Objective
from lightning_modules.stopping import Diverged, RunStopped
from reproduce.command import command, resumable
from reproduce.config import ConfigError, arguments, compose, describe, plain, presets
from reproduce.extension import check_finished, earlier_ends
from reproduce.init_from import InitFrom
from reproduce.kinds import argument_text
from reproduce.launch import job, processes, requeued, run_id
from reproduce.loggers import make_logger, report
from reproduce.provenance import Provenance, best_precision, experiment_of, machine
from reproduce.readiness import MPS_LACKS, Readiness, check_folder, check_settings, validates
from reproduce.run_folder import (
    ADVICE,
    DIVERGED,
    check_checkpoint,
    check_run_dir,
    holds_run,
    newest_checkpoint,
    open_folder,
    row_name,
    selected_weights,
)
from reproduce.stored import EXPORTED, described, exported_weights
from reproduce.streams import say
from reproduce.sweep import agent_arguments, in_sweep
from results.curves import title_of
from results.files import write, write_all

__all__ = ["command", "fit", "load_config", "make_trainer", "record"]  # what a script imports
SHARED_KEYS = (  # which base.yaml gives to every recipe
    *(
        "seed",
        "run_dir",
        "resume",
        "init_from",
        "paper",
        "trainer",
        "optim",
        "ema",
        "eval",
        "samples",
    ),
    *("quality", "metrics", "checkpoint", "logger", "budget"),
)
C = TypeVar("C", bound=L.Callback)


def load_config(script: str, doc: str, argv: list[str] | None) -> DictConfig:
    """Load the resolved, read-only config of a script, and seed the random generators.

    The config names the run folder. The program ends here, with exit code 0, after --help or
    --print-config.

    script: the file of the script, whose name is that of the experiment. doc: its docstring, which
    --help prints. argv: the arguments; None: those of the command line.

    ConfigError, one line: a mistake in the settings. Nothing has been started by then.
    """
    experiment = experiment_of(script)
    words = agent_arguments(arguments(argv), experiment)
    if {"--help", "-h"} & set(words):
        say(describe(experiment, doc, words))
        sys.exit(0)
    config = compose(experiment, [word for word in words if word != "--print-config"])
    _check_complete(config)
    L.seed_everything(config.seed, verbose=False)
    _choose_cpu_for_mps(config)
    if config.trainer.precision == "auto":
        config.trainer.precision = best_precision(config.trainer.accelerator)
    if "--print-config" in words:
        say(OmegaConf.to_yaml(config, resolve=True).rstrip("\n"))
        sys.exit(0)
    check_settings(config)
    _decide_run_dir(config)
    check_run_dir(config)
    OmegaConf.set_struct(config, False)
    config.overrides = [word for word in words if not word.startswith(("run_dir=", "resume="))]
    OmegaConf.resolve(config)
    OmegaConf.set_readonly(config, True)
    return config


def _check_complete(config: DictConfig) -> None:
    """ConfigError: a recipe lacks what base.yaml gives to all of them."""
    missing = [key for key in SHARED_KEYS if key not in config]
    if missing:
        raise ConfigError(
            f"the recipe of {config.experiment} has no {', '.join(missing)}: "
            "add base.yaml to its bases"
        )


def _decide_run_dir(config: DictConfig) -> None:
    """Set `run_dir`, the folder of the run.

    A Slurm job or a run of a sweep that is started again finds its own folder, and continues there.
    """
    if in_sweep():
        config.resume = "auto"
    elif config.resume and not config.run_dir and job() is None:
        raise ConfigError("resume=auto needs to know where: add run_dir=FOLDER")
    if config.run_dir:
        config.run_dir = str(expand_home("run_dir", config.run_dir))
        return
    folder = Path("outputs", config.experiment, run_id())
    config.run_dir = str(folder)
    is_first_start = job() is not None and not in_sweep() and not requeued()
    if is_first_start and holds_run(folder):
        raise ConfigError(
            f"{folder} holds a run of an earlier job {job()}: add run_dir={folder} to go on with "
            "it, or move it away"
        )


def _choose_cpu_for_mps(config: DictConfig) -> None:
    """On a Mac replace `auto` by the CPU: Lightning would choose the GPU, which no flow can use."""
    has_mps_alone = torch.backends.mps.is_available() and not torch.cuda.is_available()
    if config.trainer.accelerator == "auto" and has_mps_alone:
        config.trainer.accelerator = "cpu"
        rank_zero_info(f"trainer.accelerator=cpu: {MPS_LACKS}")


def make_trainer(config: DictConfig, module: Objective, *extra: L.Callback) -> L.Trainer:
    """Make a Trainer with all callbacks, the logger and the plugins of a run.

    The run folder and its log are made, too. The program ends here, with exit code 0, where the
    run is already finished. extra: callbacks of one script alone.
    """
    check_finished(config, module)
    folder = Path(config.run_dir)
    settings = trainer_settings(config)
    callbacks = make_callbacks(config, module, extra)
    preemption = next(callback for callback in callbacks if isinstance(callback, Preemption))
    preemption.listen()
    check_folder(config, module)
    open_folder(folder)
    logger = make_logger(config)
    if logger:
        callbacks += [LearningRateMonitor("step"), Throughput(config.data.batch_size)]
    silence_lightning()
    plugins: list = [SafeCheckpointIO()]
    if job() is not None:
        plugins.append(SLURMEnvironment(auto_requeue=False))
    try:
        trainer = L.Trainer(
            **settings,
            callbacks=callbacks,
            logger=logger,
            plugins=plugins,
            default_root_dir=folder,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=-1,  # a whole validation: the curve's row at step 0
            use_distributed_sampler=False,  # the data's own sampler shards without padding
            inference_mode=not module.needs_autograd,
            enable_model_summary=False,
        )
    except (TypeError, AssertionError) as error:  # what Lightning raises for a wrong type
        words = " ".join(
            f"trainer.{key}={value}" for key, value in settings.items() if value is not None
        )
        raise ConfigError(f"Lightning does not take {words}: {error}") from error
    set_signal_handlers_with(trainer, preemption.listen)
    send_no_buffers(trainer)
    _accumulate(config, trainer, module)
    return trainer


def trainer_settings(config: DictConfig) -> dict:
    """The arguments of Lightning's Trainer, from the recipe and from the launcher (srun, torchrun).

    A process that srun or torchrun has started takes its numbers of devices and nodes from there.
    """
    settings = plain(config.trainer)
    for own_key in ("compile", "recompute", "cuda_graph"):  # which Lightning does not have
        settings.pop(own_key)
    if settings["deterministic"]:  # cuDNN may find other kernels the fastest in another run
        settings["benchmark"] = False
    for key, value in processes().items():
        if settings[key] in ("auto", -1, 1):
            settings[key] = value
    if settings["max_steps"] > 0:  # at least one validation, so that there are best weights
        settings["val_check_interval"] = min(settings["val_check_interval"], settings["max_steps"])
    return settings


def make_callbacks(
    config: DictConfig, module: Objective, extra: Sequence[L.Callback] = ()
) -> list[L.Callback]:
    """The callbacks of a run, in the order in which Lightning calls them."""
    folder = Path(config.run_dir)
    batch_size = config.data.batch_size
    papers = papers_of(config)
    interval = trainer_settings(config)["val_check_interval"]
    metric = module.metric if validates(config) else None
    checkpoints = Checkpoints(folder / "checkpoints", config.checkpoint.every_n_steps, metric)
    callbacks = [
        Readiness(config),
        Provenance(config),
        InitFrom(),
        Initialization(),
        Curve(folder, batch_size, interval, papers, title_of(config.experiment, folder.name)),
        Samples(folder / "samples", **_without(config.samples, "quality_every_n_steps")),
        sample_quality(config),
        PaperComparison(papers),
        Progress(batch_size, enabled=sys.stderr.isatty()),
        *extra,
        checkpoints,
        Preemption(checkpoints),
    ]
    if config.ema.decay is not None:
        callbacks.append(EMAWeightAveraging(use_buffers=False, decay=config.ema.decay))
    return callbacks


def _without(section: DictConfig, key: str) -> dict:
    """A section of a recipe without one of its keys."""
    return {name: value for name, value in plain(section).items() if name != key}


def sample_quality(config: DictConfig) -> SampleQuality:
    """The callback for FID and other figures of samples, by the settings of a recipe."""
    return SampleQuality(
        **config.quality,
        every_n_steps=config.samples.get("quality_every_n_steps"),
        weights=config.metrics.inception_weights,
        cache=default_cache() / "quality",
    )


def _accumulate(config: DictConfig, trainer: L.Trainer, module: Objective) -> None:
    """Cut a process's share of a batch into micro-batches, whose gradients are accumulated.

    Lightning counts the interval between validations in micro-batches and a recipe in optimizer
    steps, so it is multiplied.
    """
    batch_size = config.data.batch_size
    n = n_micro_batches(batch_size, config.data.micro_batch, trainer.world_size)
    if n > 1 and has_batch_norm(module.trained):
        raise ConfigError(
            f"data.micro_batch={config.data.micro_batch}: {module.model_name} has batch norms, "
            f"which need all {batch_size} images of a step at once; give null, or more processes"
        )
    trainer.accumulate_grad_batches = n
    trainer.val_check_interval *= n


USELESS_WARNINGS = (
    "does not have many workers",
    "srun. command is available",
    "LeafSpec",
    "exists and is not empty",
    "is smaller than the logging interval",  # an epoch of few images
    "Grad strides do not match bucket view",  # from DDP, for convolutions with one input channel
    # asks for sync_dist, but figures of samples are equal on all ranks
    r"self.log\('(val|test)/(fid|kid|inception_score|precision|recall)",
)


def silence_lightning() -> None:
    """Silence messages that Lightning prints in every run and that no user can act on."""
    for text in USELESS_WARNINGS:
        warnings.filterwarnings("ignore", f".*{text}.*")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_no_tip)
    name = "lightning.pytorch.trainer.connectors.checkpoint_connector"
    logging.getLogger(name).setLevel(logging.WARNING)


def _no_tip(record: logging.LogRecord) -> bool:
    return "Tip:" not in record.getMessage()


def fit(
    config: DictConfig, trainer: L.Trainer, module: Objective, data: StatelessDataModule
) -> None:
    """Train; with resume=auto continue from the newest checkpoint of the run folder, if it has one.

    Without one a run starts from the weights that `init_from` names, or from random ones.

    ConfigError: the data are not those that the objective is for. Diverged: too many steps were not
    finite; diverged.json in the run folder then describes the training.
    """
    try:
        module.check_data(data)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    folder = Path(config.run_dir)
    path = None
    if config.resume == "auto":
        path = _load_newest(config, trainer, module)
    if path is None:
        _callback(trainer, InitFrom).load(config, module)
    if path is None and config.preset is None and not torch.cuda.is_available():
        _warn_of_duration(config, module)
    rank_zero_info(
        f"{config.experiment}: {module.n_parameters:,} parameters, {config.trainer.precision}, "
        f"run {config.run_dir}"
    )
    _note_unvalidated_end(config)
    _speed_up(config, trainer, module)
    try:
        with resumable(config, trainer), lines_above_bar():
            trainer.fit(module, datamodule=data, ckpt_path=path, weights_only=True)
            module.check_skipped()
    except Diverged:
        if trainer.is_global_zero:
            write(folder / DIVERGED, as_json(_outcome(config, trainer, module, data)))
        raise


def _speed_up(config: DictConfig, trainer: L.Trainer, module: Objective) -> None:
    """Apply trainer.recompute, trainer.compile and trainer.cuda_graph to the module."""
    if config.trainer.recompute:
        recompute(module.trained)
    if config.trainer.compile:
        module.compile_networks()
    if not config.trainer.cuda_graph:
        return
    is_one_device = isinstance(trainer.strategy, SingleDeviceStrategy)
    if is_one_device and trainer.accumulate_grad_batches == 1:
        module.capture()
    else:
        rank_zero_info(
            "trainer.cuda_graph is for one GPU that takes a batch at once: not used here"
        )


def _note_unvalidated_end(config: DictConfig) -> None:
    """Say in one line if the best weights cannot be those of the last steps.

    With a rate that falls to 0 these are nearly always the best ones.
    """
    n_steps = config.trainer.max_steps
    if n_steps <= 0 or config.checkpoint.select != "best" or not validates(config):
        return
    interval = trainer_settings(config)["val_check_interval"]
    n_last = n_steps % interval
    if n_last:
        rank_zero_info(
            f"The last {n_last:,} of {n_steps:,} steps come after the last validation, so their "
            f"weights are not tested: give a multiple of trainer.val_check_interval={interval} as "
            "trainer.max_steps, or checkpoint.select=last"
        )


def _load_newest(config: DictConfig, trainer: L.Trainer, module: Objective) -> Path | None:
    """Load the weights of the newest checkpoint of the run folder; return its path, or None."""
    newest = newest_checkpoint(Path(config.run_dir))
    if newest is None:
        return None
    path, checkpoint = newest
    check_checkpoint(path, checkpoint, config, module, trainer.accumulate_grad_batches)
    module.load_state_dict(checkpoint["state_dict"])  # Lightning loads only after its setup hooks
    origin = checkpoint["paperflows"]
    place = f"commit {origin['commit']}"
    if origin.get("job"):
        place += f", job {origin['job']}"
    rank_zero_info(f"going on from {path} ({place})")
    return path


def _warn_of_duration(config: DictConfig, module: Objective) -> None:
    """Say in one line how many days the whole budget would take on this CPU, by a timed trial."""
    if config.budget.images is None or "cpu" not in presets(config.experiment):
        return
    copied = copy.deepcopy(module)
    n_images = 4
    start = time.monotonic()
    with torch.autocast("cpu", torch.bfloat16, enabled=config.trainer.precision == "bf16-mixed"):
        loss = copied.trial(n_images)
    if loss is None:
        return
    loss.backward()
    days = (time.monotonic() - start) / n_images * config.budget.images / 86_400
    if days < 1:
        return
    rank_zero_info(
        f"No GPU here: the paper's recipe ({config.budget.images:,} images) would take about "
        f"{days:,.0f} days; preset=cpu is a smaller model for two cores"
    )


def papers_of(config: DictConfig) -> list[dict]:
    """The papers' claims with which a run is compared, by the key `paper` of its recipe.

    `paper` is null, the id of a claim, or a list of ids. Each claim gets `comparable`: whether the
    run has the claim's images, starts from random weights, and is tested on all of the test split.
    ConfigError: an id is unknown, or two claims are on the same metric.
    """
    ids = config.paper if isinstance(config.paper, ListConfig) else [config.paper]
    try:
        claims = [results.load_claim(claim_id) for claim_id in ids if claim_id is not None]
    except ValueError as error:
        raise ConfigError(f"paper={argument_text(config.paper)}: {error}") from error
    by_metric: dict[str, str] = {}
    for claim in claims:
        name = claim["metric"].split("/")[-1]  # it is logged as `paper/<name>` and `gap/<name>`
        other = by_metric.setdefault(name, claim["id"])
        if other != claim["id"]:
            raise ConfigError(
                f"paper: {other} and {claim['id']} are both claims on {name}: give one"
            )
    return [_paper(config, claim) for claim in {claim["id"]: claim for claim in claims}.values()]


def _paper(config: DictConfig, claim: dict) -> dict:
    has_images = results.same_images(claim, config.data)
    is_whole = config.trainer.limit_test_batches is None
    return {
        "claim": claim["id"],
        "metric": claim["metric"],
        "value": claim["value"],
        "decimals": results.decimals_of(claim),
        "direction": claim["direction"],
        "comparable": has_images and config.get("init_from") is None and is_whole,
    }


def record(
    config: DictConfig, trainer: L.Trainer, module: Objective, data: StatelessDataModule
) -> dict:
    """Test the selected weights, write them and result.json, and print the table of results.

    The weights of a flow go into model.safetensors, without the state of the optimizer.

    Returns the result (its form: RESULT in results/runs.py). RunStopped, with exit code 1: a metric
    is not finite. result.json is written all the same, with null in the place of the metric.
    """
    folder = Path(config.run_dir)
    outcome = _outcome(config, trainer, module, data)
    extended = earlier_ends(config, outcome["images"])
    curve = _callback(trainer, Curve)
    samples = _callback(trainer, Samples)
    weights, checkpoint = selected_weights(folder, config.checkpoint.select)
    module.load_state_dict(checkpoint["state_dict"])
    with resumable(config, trainer):
        trainer.test(module, datamodule=data, verbose=False, weights_only=True)
    tested = {key: value.item() for key, value in trainer.callback_metrics.items()}
    validated = curve.validation_result(module.metric, weights.stem == "best")
    result = outcome | {
        "metrics": {**samples.finite, **validated, **tested},
        "protocol": _of_quality(trainer, "protocol"),
        "not_measured": _of_quality(trainer, "not_measured"),
        "checkpoint": str(weights.relative_to(folder)),
        "tested": {
            "weights": _tested_weights(config),
            "chosen": weights.stem.partition("-")[0],
            "step": checkpoint["global_step"],
        },
        "wandb_url": _wandb_url(trainer),
        "weights": None,
        "suspect": None,
    }
    content = exported_weights(weights, checkpoint)
    if content is not None:
        result["weights"] = described(content, EXPORTED)
    if extended:
        result["extended"] = extended
    result |= results.compare_all(result)
    if trainer.is_global_zero:
        files: dict[Path, str | bytes] = {folder / "result.json": as_json(result)}
        if content is not None:  # together with the result that describes it
            files = {folder / EXPORTED: content, **files}
        write_all(files)
        report(trainer.logger, result)
        _print_summary(folder, result)
    _check_finite(result["metrics"])
    return result


def _of_quality(trainer: L.Trainer, name: str) -> dict:
    """What the callbacks on image quality say of their metrics: `protocol` or `not_measured`."""
    callbacks: list[L.Callback] = vars(trainer)["callbacks"]
    return {
        metric: value
        for callback in callbacks
        if isinstance(callback, SampleQuality | ImageQuality)
        for metric, value in getattr(callback, name).items()
    }


def _tested_weights(config: DictConfig) -> str:
    if config.ema.decay is None:
        return "raw"
    return f"averaged with decay {config.ema.decay}"


def _wandb_url(trainer: L.Trainer) -> str | None:
    """The address of the run at W&B; None offline, and with another logger."""
    run = getattr(trainer.logger, "experiment", None)
    if getattr(run, "offline", True):
        return None
    return getattr(run, "url", None)


def _check_finite(metrics: dict[str, float]) -> None:
    """RunStopped: a metric of a finished run is nan or infinite."""
    wrong = [key for key, value in metrics.items() if not math.isfinite(value)]
    if wrong:
        raise RunStopped(
            f"{', '.join(wrong)} of the trained weights is not finite, and null in result.json. "
            f"{ADVICE}"
        )


def as_json(result: dict) -> str:
    """A result as JSON, which has no nan and no infinity: they become null."""
    return json.dumps(_finite_or_null(result), indent=1, allow_nan=False)


def _finite_or_null(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite_or_null(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite_or_null(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _outcome(
    config: DictConfig, trainer: L.Trainer, module: Objective, data: StatelessDataModule
) -> dict:
    """The content of a result without its `metrics`, which are empty: what was trained, and how."""
    images = trainer.global_step * config.data.batch_size
    curve = _callback(trainer, Curve)
    provenance = _callback(trainer, Provenance)
    metric = module.metric
    outcome = {
        "experiment": config.experiment,
        "run": row_name(Path(config.run_dir)),
        "preset": config.preset,
        "overrides": list(config.overrides),
        "metrics": {},
        "metric": {  # the one that the curve shows
            "name": metric.name,
            "direction": metric.direction,
            "unit": metric.unit,
        },
        "papers": papers_of(config),
        "budget": _budget(config, images),
        "seed": config.seed,
        "commit": provenance.commit,
        "dirty": provenance.dirty,
        "config": plain(config),
        **machine(trainer),
        "precision": config.trainer.precision,
        "deterministic": bool(config.trainer.deterministic),
        "images": images,
        "seconds": round(curve.seconds, 1),
        "skipped_steps": int(module.skipped),
        "n_train": data.n_train,
        "parameters": module.n_parameters,
        **_callback(trainer, InitFrom).record,
    }
    if data.content_hash is not None:
        outcome["data"] = {"sha256": data.content_hash, "n_images": data.counts()}
    return outcome


def _budget(config: DictConfig, images: int) -> dict | None:
    """The share of a recipe's training that a run had; None where the recipe gives no budget.

    None too for a run that started from trained weights, which had more training than its own.
    """
    full = config.budget.images
    if full is None or config.get("init_from") is not None:
        return None
    return {"images": images, "of": full, "fraction": images / full, "source": "ours"}


def _callback(trainer: L.Trainer, kind: type[C]) -> C:
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set in __init__
    return next(callback for callback in callbacks if isinstance(callback, kind))


def _print_summary(folder: Path, result: dict) -> None:
    """Print the table of results, and the paths of the newest samples, the curve and the result."""
    say(f"\n{comparison_table(result)}\n")
    pictures = sorted((folder / "samples").glob("samples-*.png"))[-1:]
    pictures += sorted(folder.glob("*.png"))
    say(*pictures, folder / "result.json")
