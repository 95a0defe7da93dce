"""The only glue: a config becomes a trainer, a trainer a run folder, a run folder a result."""

import copy
import json
import logging
import sys
import time
import warnings
from pathlib import Path

import lightning.pytorch as L
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateMonitor
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info
from omegaconf import DictConfig, ListConfig, OmegaConf

import results
from datamodules.samplers import n_micro_batches
from flows.recompute import recompute
from lightning_modules.batch_norm import has_batch_norm
from lightning_modules.callbacks.checkpoints import Checkpoints
from lightning_modules.callbacks.curve import Curve
from lightning_modules.callbacks.initialization import Initialization
from lightning_modules.callbacks.paper import PaperComparison, comparison_table
from lightning_modules.callbacks.preemption import Preemption
from lightning_modules.callbacks.progress import Progress
from lightning_modules.callbacks.samples import Samples
from lightning_modules.checkpoint_io import SafeCheckpointIO
from lightning_modules.lightning_internals import send_no_buffers, set_signal_handlers_with
from lightning_modules.objective import Objective
from lightning_modules.stopping import Diverged
from reproduce.command import command, resumable
from reproduce.config import ConfigError, arguments, compose, describe, presets
from reproduce.launch import check_processes, job, processes, requeued, run_id
from reproduce.loggers import make_logger, report
from reproduce.provenance import Provenance, best_precision, experiment_of, machine
from reproduce.run_folder import (
    DIVERGED,
    check_checkpoint,
    check_run_dir,
    holds_run,
    newest_checkpoint,
    open_folder,
    selected_weights,
)
from reproduce.streams import say
from reproduce.sweep import agent_arguments, in_sweep
from results.files import write

__all__ = ["command", "fit", "load_config", "make_trainer", "record"]  # what a script is made of


def load_config(script: str, doc: str, argv: list[str] | None) -> DictConfig:
    """The resolved, read-only config of a script, with its run folder decided and the random generators seeded.

    Answers --help and --print-config itself, and ends with 0 where the run is already finished.
    """
    experiment = experiment_of(script)
    words = agent_arguments(arguments(argv), experiment)
    if {"--help", "-h"} & set(words):
        print(describe(experiment, doc))
        sys.exit(0)
    config = compose(experiment, [word for word in words if word != "--print-config"])
    L.seed_everything(config.seed, verbose=False)
    _choose_cpu_for_mps(config)
    if config.trainer.precision == "auto":
        config.trainer.precision = best_precision(config.trainer.accelerator)
    if "--print-config" in words:
        print(OmegaConf.to_yaml(config, resolve=True), end="")
        sys.exit(0)
    if config.trainer.accelerator == "mps":
        raise ConfigError(f"trainer.accelerator=mps, but {MPS_LACKS}: give cpu")
    if config.trainer.accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise ConfigError(
            f"trainer.accelerator={config.trainer.accelerator}, but there is no GPU here: give preset=cpu"
        )
    on_cpu = config.trainer.accelerator == "cpu" or not torch.cuda.is_available()
    if config.trainer.cuda_graph and on_cpu:
        raise ConfigError("trainer.cuda_graph=true needs a GPU: give false")
    if config.trainer.precision == "16-mixed" and on_cpu:  # Lightning would take bf16
        raise ConfigError("trainer.precision=16-mixed needs a GPU: give bf16-mixed or 32-true")
    for key in ("val_check_interval", "log_every_n_steps"):
        if config.trainer[key] < 1:
            raise ConfigError(f"trainer.{key}={config.trainer[key]} are steps: give at least 1")
    if config.checkpoint.select == "best" and not _validates(config):
        keys = [
            key
            for key in ("data.n_val", "trainer.limit_val_batches")
            if OmegaConf.select(config, key) == 0
        ]
        settings = " ".join(f"{key}=0" for key in keys)
        raise ConfigError(
            f"{settings} leaves nothing to choose the best weights by: add checkpoint.select=last"
        )
    if config.trainer.limit_test_batches == 0:
        raise ConfigError(
            "trainer.limit_test_batches=0 tests nothing: give at least 1, or null for all"
        )
    check_processes(config.trainer)
    _decide_run_dir(config)
    check_run_dir(config)
    OmegaConf.set_struct(config, False)
    config.overrides = [word for word in words if not word.startswith(("run_dir=", "resume="))]
    OmegaConf.resolve(config)
    OmegaConf.set_readonly(config, True)
    return config


def _decide_run_dir(config: DictConfig) -> None:
    """The folder of the run. A job or a sweep's run that is started again finds its own and goes on there."""
    if in_sweep():
        config.resume = "auto"
    elif config.resume and not config.run_dir and job() is None:
        raise ConfigError("resume=auto needs to know where: add run_dir=FOLDER")
    if config.run_dir:
        config.run_dir = str(Path(str(config.run_dir)).expanduser())
        return
    folder = Path("outputs", config.experiment, run_id())
    config.run_dir = str(folder)
    if job() is not None and not in_sweep() and not requeued() and holds_run(folder):
        raise ConfigError(
            f"{folder} holds a run of an earlier job {job()}: add run_dir={folder} to go on with it, or move it away"
        )


def _validates(config: DictConfig) -> bool:
    """Whether there is a validation. A data set with a split of its own for it has no data.n_val."""
    return config.data.get("n_val") != 0 and config.trainer.limit_val_batches != 0


MPS_LACKS = "a Mac's GPU (MPS) lacks the float64 in which flows make their matrices"


def _choose_cpu_for_mps(config: DictConfig) -> None:
    """The accelerator that Lightning would choose on a Mac cannot train a flow."""
    if (
        config.trainer.accelerator == "auto"
        and not torch.cuda.is_available()
        and torch.backends.mps.is_available()
    ):
        config.trainer.accelerator = "cpu"
        rank_zero_info(f"trainer.accelerator=cpu: {MPS_LACKS}")


def make_trainer(config: DictConfig, module: Objective, *extra: L.Callback) -> L.Trainer:
    """A Trainer with everything that a run of this house has; makes the run folder and its log."""
    folder, batch_size, papers = Path(config.run_dir), config.data.batch_size, papers_of(config)
    settings = OmegaConf.to_container(config.trainer)
    for ours in ("compile", "recompute", "cuda_graph"):
        settings.pop(ours)
    settings["benchmark"] &= not settings[
        "deterministic"
    ]  # it may choose other kernels in another run
    settings |= {key: value for key, value in processes().items() if settings[key] in ("auto", 1)}
    if settings["max_steps"] > 0:  # at least one validation, so that there are best weights
        settings["val_check_interval"] = min(settings["val_check_interval"], settings["max_steps"])
    if type(settings["max_epochs"]) not in (int, type(None)):
        raise ConfigError(
            f"trainer.max_epochs={settings['max_epochs']} is no number of epochs: give an int"
        )
    interval = settings["val_check_interval"]
    metric = module.metric if _validates(config) else None
    checkpoints = Checkpoints(folder / "checkpoints", config.checkpoint.every_n_steps, metric)
    preemption = Preemption(checkpoints)
    preemption.listen()
    callbacks = [
        Provenance(config),
        Initialization(),
        Curve(folder, batch_size, interval, papers),
        Samples(folder / "samples", **config.samples),
        PaperComparison(papers),
        Progress(batch_size, enabled=sys.stderr.isatty()),
        *extra,
        checkpoints,
        preemption,
    ]
    if config.ema.decay is not None:
        if not isinstance(config.ema.decay, float) or not 0 <= config.ema.decay <= 1:
            raise ConfigError(
                f"ema.decay={config.ema.decay} is not between 0 and 1: give for example 0.999"
            )
        callbacks.append(EMAWeightAveraging(use_buffers=False, decay=config.ema.decay))
    open_folder(folder)
    logger = make_logger(config)
    if logger:
        callbacks.append(LearningRateMonitor("step"))
    _hush()
    plugins = [
        SafeCheckpointIO(),
        *([SLURMEnvironment(auto_requeue=False)] if job() is not None else []),
    ]
    try:
        trainer = L.Trainer(
            **settings,
            callbacks=callbacks,
            logger=logger,
            plugins=plugins,
            default_root_dir=folder,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=-1,  # all of it: the curve's row at step 0
            use_distributed_sampler=False,  # ours shards without padding
            inference_mode=not module.needs_autograd,
            enable_model_summary=False,
        )
    except (
        TypeError,
        AssertionError,
    ) as error:  # how Lightning answers to a value of the wrong type
        words = " ".join(
            f"trainer.{key}={value}" for key, value in settings.items() if value is not None
        )
        raise ConfigError(f"Lightning does not take {words}: {error}") from error
    set_signal_handlers_with(trainer, preemption.listen)
    send_no_buffers(trainer)
    _accumulate(config, trainer, module)
    return trainer


def _accumulate(config: DictConfig, trainer: L.Trainer, module: Objective) -> None:
    """Cut a step's share of a process into micro-batches; Lightning counts batches, a recipe optimizer steps."""
    n = n_micro_batches(
        batch_size := config.data.batch_size, config.data.micro_batch, trainer.world_size
    )
    if n > 1 and has_batch_norm(module.trained):
        raise ConfigError(
            f"data.micro_batch={config.data.micro_batch}: {module.model_name} has batch norms, which need all "
            f"{batch_size} images of a step at once; give null, or more processes"
        )
    trainer.accumulate_grad_batches = n
    trainer.val_check_interval *= n


def _hush() -> None:
    """Silence what Lightning says in every run and nobody can act on."""
    texts = (
        "does not have many workers",
        "srun. command is available",
        "LeafSpec",
        "exists and is not empty",
    )
    texts += (
        "Grad strides do not match bucket view",
    )  # DDP, of convolutions with one input channel
    for text in (
        *texts,
        r"self.log\('(paper|gap)/",
    ):  # the last: over ranks, of what is equal on all of them
        warnings.filterwarnings("ignore", f".*{text}.*")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_no_tip)
    logging.getLogger("lightning.pytorch.trainer.connectors.checkpoint_connector").setLevel(
        logging.WARNING
    )


def _no_tip(record: logging.LogRecord) -> bool:
    return "Tip:" not in record.getMessage()


def fit(
    config: DictConfig, trainer: L.Trainer, module: Objective, data: L.LightningDataModule
) -> None:
    """Train, from the newest checkpoint of the run folder where resume=auto finds one. Diverged: see diverged.json."""
    try:
        module.check_data(data)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    folder = Path(config.run_dir)
    path = _go_on(config, trainer, module) if config.resume == "auto" else None
    if path is None and config.preset is None and not torch.cuda.is_available():
        _say_how_long(config, module)
    rank_zero_info(
        f"{config.experiment}: {module.n_parameters:,} parameters, {config.trainer.precision}, run {config.run_dir}"
    )
    if config.trainer.recompute:
        recompute(module.trained)
    if config.trainer.compile:
        module.compile_networks()
    if config.trainer.cuda_graph:
        if (
            isinstance(trainer.strategy, SingleDeviceStrategy)
            and trainer.accumulate_grad_batches == 1
        ):
            module.capture()
        else:
            rank_zero_info(
                "trainer.cuda_graph is for one GPU that takes a batch at once: not used here"
            )
    try:
        with resumable(config, trainer):
            trainer.fit(module, datamodule=data, ckpt_path=path, weights_only=True)
            module.check_skipped()
    except Diverged:
        if trainer.is_global_zero:
            write(folder / DIVERGED, json.dumps(_outcome(config, trainer, module, data), indent=1))
        raise


def _go_on(config: DictConfig, trainer: L.Trainer, module: Objective) -> Path | None:
    """The newest checkpoint of the run folder, whose weights the module then has; None where there is none."""
    newest = newest_checkpoint(Path(config.run_dir))
    if newest is None:
        return None
    path, checkpoint = newest
    check_checkpoint(path, checkpoint, config, module, trainer.accumulate_grad_batches)
    module.load_state_dict(checkpoint["state_dict"])  # Lightning does so too, after its setup hooks
    origin = checkpoint["paperflows"]
    job_number = f", job {origin['job']}" if origin.get("job") else ""
    rank_zero_info(f"going on from {path} (commit {origin['commit']}{job_number})")
    return path


def _say_how_long(config: DictConfig, module: Objective) -> None:
    """One line, measured: how long the whole budget would take on this machine without a GPU."""
    if config.budget.images is None or "cpu" not in presets(config.experiment):
        return
    copied, n = copy.deepcopy(module), 4
    start = time.monotonic()
    with torch.autocast("cpu", torch.bfloat16, enabled=config.trainer.precision == "bf16-mixed"):
        loss = copied.trial(n)
    if loss is None:
        return
    loss.backward()
    days = (time.monotonic() - start) / n * config.budget.images / 86_400
    if days < 1:
        return
    rank_zero_info(
        f"No GPU here: the paper's recipe ({config.budget.images:,} images) would take about {days:,.0f} days; "
        "preset=cpu is a smaller model for two cores"
    )


def papers_of(config: DictConfig) -> list[dict]:
    """The claims beside which a run is shown; comparable where data and test split are the claim's.

    `paper` is null, an id, or a list of ids. ConfigError, ValueError: an unknown id, or two claims on one metric.
    """
    ids = config.paper if isinstance(config.paper, ListConfig) else [config.paper]
    claims = [results.load_claim(claim_id) for claim_id in ids if claim_id is not None]
    by_metric: dict[str, str] = {}
    for claim in claims:
        name = claim["metric"].split("/")[
            -1
        ]  # what `paper/<name>` and `gap/<name>` are called in the logs
        other = by_metric.setdefault(name, claim["id"])
        if other != claim["id"]:
            raise ConfigError(
                f"paper: {other} and {claim['id']} are both claims on {name}: give one"
            )
    return [_paper(config, claim) for claim in {claim["id"]: claim for claim in claims}.values()]


def _paper(config: DictConfig, claim: dict) -> dict:
    same_data = config.data.name == claim["data"] and results.same_n_bits(claim, config.data)
    return {
        "claim": claim["id"],
        "metric": claim["metric"],
        "value": claim["value"],
        "decimals": results.decimals_of(claim),
        "direction": claim["direction"],
        "comparable": same_data and config.trainer.limit_test_batches is None,
    }


def record(
    config: DictConfig, trainer: L.Trainer, module: Objective, data: L.LightningDataModule
) -> dict:
    """Test the selected weights, write result.json, print the table. Returns the result (schema: results/runs.py)."""
    folder, outcome = Path(config.run_dir), _outcome(config, trainer, module, data)
    curve, samples = (_callback(trainer, kind) for kind in (Curve, Samples))
    weights, checkpoint = selected_weights(folder, config.checkpoint.select)
    module.load_state_dict(checkpoint["state_dict"])
    with resumable(config, trainer):
        trainer.test(module, datamodule=data, verbose=False, weights_only=True)
    tested = {key: value.item() for key, value in trainer.callback_metrics.items()}
    wandb_run = getattr(trainer.logger, "experiment", None)
    result = outcome | {
        "metrics": {
            **samples.finite,
            **curve.validated(module.metric, weights.stem == "best"),
            **tested,
        },
        "checkpoint": str(weights.relative_to(folder)),
        "tested": {
            "weights": "raw"
            if config.ema.decay is None
            else f"averaged with decay {config.ema.decay}",
            "chosen": weights.stem.partition("-")[0],
            "step": checkpoint["global_step"],
        },
        "wandb_url": None if getattr(wandb_run, "offline", True) else wandb_run.url,
        "weights": None,
        "suspect": None,
    }
    result |= results.compare_all(result)
    if trainer.is_global_zero:
        write(folder / "result.json", json.dumps(result, indent=1))
        report(trainer.logger, result)
        _say_what_there_is(folder, result)
    return result


def _outcome(
    config: DictConfig, trainer: L.Trainer, module: Objective, data: L.LightningDataModule
) -> dict:
    """What a result says of the training that has ended: all but the metrics, which are empty."""
    images, budget = trainer.global_step * config.data.batch_size, config.budget.images
    curve, provenance = (_callback(trainer, kind) for kind in (Curve, Provenance))
    metric = module.metric
    return {
        "experiment": config.experiment,
        "run": Path(config.run_dir).name,
        "preset": config.preset,
        "overrides": list(config.overrides),
        "metrics": {},
        "metric": {
            "name": metric.name,
            "direction": metric.direction,
            "unit": metric.unit,
        },  # of the curve
        "papers": papers_of(config),
        "budget": budget
        and {"images": images, "of": budget, "fraction": images / budget, "source": "ours"},
        "seed": config.seed,
        "commit": provenance.commit,
        "dirty": provenance.dirty,
        "config": OmegaConf.to_container(config),
        **machine(trainer),
        "precision": config.trainer.precision,
        "deterministic": bool(config.trainer.deterministic),
        "images": images,
        "seconds": round(curve.seconds, 1),
        "skipped_steps": module.skipped.item(),
        "n_train": data.n_train,
        "parameters": module.n_parameters,
    }


def _callback(trainer: L.Trainer, kind: type):
    return next(c for c in trainer.callbacks if isinstance(c, kind))


def _say_what_there_is(folder: Path, result: dict) -> None:
    say(f"\n{comparison_table(result)}\n")
    pictures = sorted((folder / "samples").glob("samples-*.png"))[-1:] + sorted(
        folder.glob("*.png")
    )
    say(*pictures, folder / "result.json")
