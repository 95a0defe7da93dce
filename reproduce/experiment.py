"""The only glue: a config becomes a trainer, a trainer a run folder, a run folder a result."""

import copy
import functools
import json
import logging
import os
import secrets
import subprocess
import sys
import time
import warnings
from importlib import import_module, metadata
from pathlib import Path

import lightning.pytorch as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from omegaconf import DictConfig, OmegaConf

import results
from lightning_modules.callbacks.curve import Curve
from lightning_modules.callbacks.paper import PaperComparison, comparison_table
from lightning_modules.callbacks.progress import Progress
from lightning_modules.callbacks.samples import Samples
from reproduce.config import ConfigError, arguments, compose, describe

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "lightning", "torchmetrics", "torchvision", "omegaconf", "numpy")


def command(main):
    """Turn a user's mistake into one line and exit code 1; everything unforeseen keeps its traceback.

    A mistake is a ConfigError, a setting that Lightning refuses, or an OSError or ValueError raised by this
    repository's own code rather than somewhere inside a library.
    """

    @functools.wraps(main)
    def wrapped(argv=None):
        try:
            return main(argv)
        except (ConfigError, MisconfigurationException) as error:
            sys.exit(f"error: {' '.join(str(error).split())}")
        except (OSError, ValueError) as error:
            trace = error.__traceback__
            while trace.tb_next is not None:
                trace = trace.tb_next
            source = Path(trace.tb_frame.f_code.co_filename)
            if not source.is_relative_to(ROOT) or "site-packages" in source.parts:
                raise
            sys.exit(f"error: {error}")
        except KeyboardInterrupt:
            sys.exit("stopped")

    return wrapped


# ---------------------------------------------------------------------------------------------- config


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
    if config.checkpoint.select == "best" and config.data.get("n_val") == 0:
        raise ConfigError("data.n_val=0 leaves nothing to choose the best weights by: add checkpoint.select=last")
    if "--print-config" in given:
        print(OmegaConf.to_yaml(config, resolve=True), end="")
        sys.exit(0)
    config.run_dir = str(config.run_dir or Path("outputs") / experiment / run_id())
    if rank_zero_only.rank == 0:
        _check_run_dir(config)
    OmegaConf.set_struct(config, False)
    config.overrides = [a for a in given if not a.startswith(("run_dir=", "resume="))]
    OmegaConf.resolve(config)
    OmegaConf.set_readonly(config, True)
    return config


def best_precision(accelerator: str) -> str:
    """bf16-mixed where the hardware multiplies bf16 (GPU; CPU with AMX or AVX512-BF16), else 32-true."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "32-true"
    able = torch.cpu.get_capabilities()
    return "bf16-mixed" if able.get("amx_bf16") or able.get("avx512_bf16") else "32-true"


def run_id() -> str:
    """Made once and handed to other ranks by environment; under SLURM it is the job's, also after a requeue."""
    if "SLURM_JOB_ID" in os.environ:
        array = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
        return "slurm-" + ("_".join(array) if all(array) else os.environ["SLURM_JOB_ID"])
    return os.environ.setdefault("PAPERFLOWS_RUN_ID", f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}")


def _check_run_dir(config: DictConfig) -> None:
    """Refuse to mix two runs in one folder."""
    folder = Path(config.run_dir)
    if not (folder / "config.yaml").is_file():
        return
    if config.resume is None:
        raise ConfigError(f"{folder} holds a run: add resume=auto to go on with it, or give another run_dir")
    there = OmegaConf.load(folder / "config.yaml")
    if there.experiment != config.experiment:
        raise ConfigError(
            f"{folder} holds a run of {there.experiment}, not of {config.experiment}: give another run_dir"
        )
    if (folder / "result.json").is_file():
        print(f"{folder} is finished: see {folder / 'result.json'}")
        sys.exit(0)


# ---------------------------------------------------------------------------------------------- training


class Provenance(L.Callback):
    """Writes into every checkpoint, as plain dicts, which experiment it is of and with which config and commit."""

    def __init__(self, config: DictConfig) -> None:
        self.commit, self.dirty = git_state()
        self.config = OmegaConf.to_container(config)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict) -> None:
        shape, source = list(pl_module.flow.shape), {"commit": self.commit, "dirty": self.dirty}
        checkpoint["paperflows"] = {
            "experiment": self.config["experiment"],
            "config": self.config,
            "shape": shape,
            **source,
        }


def make_trainer(config: DictConfig, *extra: L.Callback) -> L.Trainer:
    """A Trainer with everything that a run of this house has; makes the run folder and its log."""
    folder, batch_size = Path(config.run_dir), config.data.batch_size
    _open_folder(folder, config)
    paper = paper_of(config)
    arguments = OmegaConf.to_container(config.trainer)
    arguments.pop("compile")
    if arguments["max_steps"] > 0:  # at least one validation, so that there are best weights
        arguments["val_check_interval"] = min(arguments["val_check_interval"], arguments["max_steps"])
    checkpoints = {"dirpath": folder / "checkpoints", "auto_insert_metric_name": False, "enable_version_counter": False}
    metric = "nll" if config.data.name == "two_moons" else "bpd"
    callbacks = [
        Provenance(config),
        Curve(folder, batch_size, paper["value"] if paper else None),
        Samples(folder / "samples", **config.samples),
        PaperComparison(paper),
        Progress(batch_size, enabled=sys.stderr.isatty()),
        ModelCheckpoint(filename="step-{step:08d}", every_n_train_steps=config.checkpoint.every_n_steps, **checkpoints),
        *extra,
    ]
    if config.data.get("n_val") != 0:
        callbacks.append(ModelCheckpoint(filename="best", monitor=f"val/{metric}", **checkpoints))
    if config.ema.decay is not None:
        callbacks.append(EMAWeightAveraging(use_buffers=False, decay=config.ema.decay))
    logger = make_logger(config)
    if logger:
        callbacks.append(LearningRateMonitor("step"))
    return L.Trainer(
        **arguments,
        callbacks=callbacks,
        logger=logger,
        default_root_dir=folder,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=-1,  # all of it: the curve's row at step 0
        use_distributed_sampler=False,  # ours shards without padding
        enable_model_summary=False,
        plugins=[],
    )


def fit(config: DictConfig, trainer: L.Trainer, module: L.LightningModule, data: L.LightningDataModule) -> None:
    """Train, from the newest checkpoint of the run folder where resume=auto finds one."""
    checkpoint = newest_checkpoint(Path(config.run_dir)) if config.resume == "auto" else None
    if checkpoint is not None:
        _check_checkpoint(checkpoint, config)
        rank_zero_info(f"going on from {checkpoint}")
    elif config.preset is None and not torch.cuda.is_available():
        _say_how_long(config, module)
    n_parameters = sum(p.numel() for p in module.flow.parameters())
    rank_zero_info(
        f"{config.experiment}: {n_parameters:,} parameters, {config.trainer.precision}, run {config.run_dir}"
    )
    if config.trainer.compile:
        module.flow.compile()
    try:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except SystemExit:  # Ctrl-C: Lightning has shut down in order
        again = " ".join([f"python reproduce/{config.experiment}.py", *config.overrides, f"run_dir={config.run_dir}"])
        sys.exit(f"stopped at step {trainer.global_step}; go on with: {again} resume=auto")
    last = Path(config.run_dir) / "checkpoints" / f"step-{trainer.global_step:08d}.ckpt"
    if not last.is_file():
        trainer.save_checkpoint(last)


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the highest step in a run folder, or None."""
    return max((folder / "checkpoints").glob("step-*.ckpt"), default=None)


def read_checkpoint(path: Path) -> dict:
    """A checkpoint of ours on the CPU, plain tensors and dicts only. ValueError, one line: unreadable or not ours."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["paperflows"]["experiment"], checkpoint["state_dict"]
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is damaged or no checkpoint of this repository: delete it or name another") from error
    return checkpoint


def _check_checkpoint(path: Path, config: DictConfig) -> None:
    there, flow = read_checkpoint(path)["paperflows"], OmegaConf.to_container(config.flow)
    if there["experiment"] != config.experiment or there["config"]["flow"] != flow:
        raise ConfigError(
            f"{path} is of {there['experiment']} with flow {there['config']['flow']}, "
            f"not of {config.experiment} with flow {flow}: give another run_dir"
        )


def _open_folder(folder: Path, config: DictConfig) -> None:
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*srun. command is available.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated.*")
    warnings.filterwarnings("ignore", ".*Checkpoint directory .* exists and is not empty.*")
    if rank_zero_only.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(OmegaConf.to_yaml(config))
        log, handler = logging.getLogger("lightning.pytorch"), logging.FileHandler(folder / "log.txt")
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        for old in [h for h in log.handlers if isinstance(h, logging.FileHandler)]:
            log.removeHandler(old)
        log.addHandler(handler)


def make_logger(config: DictConfig):
    """W&B (offline where nobody is logged in, so that it never asks), CSV files, or none."""
    folder, name = Path(config.run_dir), config.logger.name
    if name == "none":
        return False
    if name == "csv":
        return L.loggers.CSVLogger(folder, name="", version="logs")
    try:
        import wandb
    except ImportError as error:
        raise ConfigError("logger.name=wandb needs wandb: pip install wandb, or add logger.name=csv") from error
    from lightning.pytorch.loggers import WandbLogger

    mode = os.environ.get("WANDB_MODE") or ("online" if _logged_in() else "offline")
    settings = wandb.Settings(mode=mode, silent=True)
    logger = WandbLogger(
        name=folder.name, project=config.logger.project, group=config.experiment, save_dir=folder, settings=settings
    )
    logger.log_hyperparams(OmegaConf.to_container(config))
    return logger


def _logged_in() -> bool:
    import netrc

    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


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


# ---------------------------------------------------------------------------------------------- results


def paper_of(config: DictConfig) -> dict | None:
    """The claim beside which a run is shown; comparable where the run's data and test split are the claim's."""
    if config.paper is None:
        return None
    claim = results.load_claim(config.paper)
    whole = config.trainer.limit_test_batches is None
    comparable = whole and config.data.name == config.recipe_data
    return {"claim": config.paper, "metric": claim["metric"], "value": claim["value"], "comparable": comparable}


def record(config: DictConfig, trainer: L.Trainer, module: L.LightningModule, data: L.LightningDataModule) -> dict:
    """Test the selected weights, write result.json, print the table. Returns the result."""
    folder, images = Path(config.run_dir), trainer.global_step * config.data.batch_size
    logged = {k: v.item() for k, v in trainer.callback_metrics.items() if k.startswith("samples/")}
    curve = next(c for c in trainer.callbacks if isinstance(c, Curve))
    seconds = round(curve.seconds, 1)
    best = folder / "checkpoints" / "best.ckpt"
    use_best = config.checkpoint.select == "best" and best.is_file()
    weights = best if use_best else newest_checkpoint(folder)
    module.load_state_dict(read_checkpoint(weights)["state_dict"])
    trainer.test(module, datamodule=data, verbose=False, weights_only=True)
    tested = {
        k: v.item() for k, v in trainer.callback_metrics.items() if not k.startswith(("paper/", "gap/", "train/"))
    }
    val = f"val/{module.metric}"
    chosen = [row[val] for row in curve.rows if row[val] is not None]
    metrics = {**logged, **tested, **({val: min(chosen) if use_best else chosen[-1]} if chosen else {})}
    provenance = next(c for c in trainer.callbacks if isinstance(c, Provenance))
    budget, url = config.budget.images, getattr(getattr(trainer.logger, "experiment", None), "url", None)
    result = {
        "experiment": config.experiment,
        "run": folder.name,
        "preset": config.preset,
        "overrides": list(config.overrides),
        "metrics": metrics,
        "paper": paper_of(config),
        "budget": budget and {"images": images, "of": budget, "fraction": images / budget, "source": "ours"},
        "seed": config.seed,
        "commit": provenance.commit,
        "dirty": provenance.dirty,
        "config": OmegaConf.to_container(config),
        "versions": {"python": sys.version.split()[0]} | {name: metadata.version(name) for name in PACKAGES},
        "device": device_name(trainer),
        "precision": config.trainer.precision,
        "tf32": torch.backends.cudnn.allow_tf32 and trainer.strategy.root_device.type == "cuda",
        "deterministic": bool(config.trainer.deterministic),
        "images": images,
        "seconds": seconds,
        "n_train": data.n_train,
        "parameters": sum(p.numel() for p in module.flow.parameters()),
        "checkpoint": str(weights.relative_to(folder)),
        "wandb_url": url if isinstance(url, str) else None,
        "weights": None,
        "suspect": None,
    }
    result |= results.compare(result)
    if trainer.is_global_zero:
        part = folder / "result.json.part"
        part.write_text(json.dumps(result, indent=1))
        part.replace(folder / "result.json")
        _say_what_there_is(folder, result)
    return result


def _say_what_there_is(folder: Path, result: dict) -> None:
    print(f"\n{comparison_table(result)}\n")
    pictures = sorted((folder / "samples").glob("samples-*.png"))[-1:] + sorted(folder.glob("*.png"))
    for path in [*pictures, folder / "result.json"]:
        print(path)


def device_name(trainer: L.Trainer) -> str:
    """'2 x NVIDIA H200', or the CPU's name and its number of threads."""
    if trainer.strategy.root_device.type == "cuda":
        return f"{trainer.world_size} x {torch.cuda.get_device_name()}"
    return f"{torch.cpu.get_capabilities().get('cpu_name', 'CPU').strip()}, {torch.get_num_threads()} threads"


def git_state() -> tuple[str | None, bool]:
    """The commit of this checkout and whether tracked files differ from it; (None, False) outside git."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return None, False


def load_flow(folder: str | Path):
    """The flow of a finished or running run, or of one checkpoint file, in eval mode on the CPU.

    Batch-norm statistics are the running ones. ValueError or FileNotFoundError, one line: nothing there to load.
    """
    path = Path(folder)
    if path.is_dir():
        finished = path / "result.json"
        chosen = (
            path / json.loads(finished.read_text())["checkpoint"] if finished.is_file() else newest_checkpoint(path)
        )
        if chosen is None:
            raise FileNotFoundError(
                f"{path} holds no checkpoint: give the folder of a run, outputs/<experiment>/<run id>"
            )
        path = chosen
    checkpoint = read_checkpoint(path)
    there = checkpoint["paperflows"]
    script = import_module(f"reproduce.{there['experiment']}")
    flow = script.make_flow(OmegaConf.create(there["config"]), there["shape"])
    prefix = "flow."
    flow.load_state_dict(
        {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
    )
    return flow.eval()
