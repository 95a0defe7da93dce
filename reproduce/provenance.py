"""Where a number comes from: commit, versions, device, precision."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as L
import torch
from omegaconf import DictConfig, OmegaConf

import results
from lightning_modules.lightning_internals import datamodule_of
from lightning_modules.objective import as_objective
from lightning_modules.stopping import writing
from reproduce.config import ConfigError
from results.files import write

ROOT = Path(__file__).resolve().parent.parent
THIS_FILE = "reproduce/provenance.py"
PACKAGES = ("torch", "lightning", "torchmetrics", "torchvision", "omegaconf", "numpy")


class Provenance(L.Callback):
    """Writes the config into the run folder, and config and commit into every checkpoint.

    A checkpoint holds them as plain dicts, so that it can be loaded without running code.
    """

    def __init__(self, config: DictConfig) -> None:
        self.commit, self.dirty = git_state()
        self.config = cast(dict[str, Any], OmegaConf.to_container(config))

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the config, now that the data were found and everything has been built.

        RunStopped, on all ranks: it cannot be written.
        """
        path = Path(self.config["run_dir"], "config.yaml")
        with writing(trainer, path):
            if trainer.is_global_zero:
                write(path, OmegaConf.to_yaml(self.config))
        if trainer.logger is not None:
            trainer.logger.log_hyperparams(self.config | self._facts(trainer, pl_module))

    def _facts(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """What a logger gets beside the config, by the names of result.json (`sweep.FACTS`)."""
        return {
            "parameters": as_objective(pl_module).n_parameters,
            "commit": self.commit,
            "dirty": self.dirty,
            **machine(trainer),
        }

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        objective = as_objective(pl_module)
        shape = objective.shape
        class_names = getattr(datamodule_of(trainer), "class_names", None)
        checkpoint["paperflows"] = {
            "experiment": self.config["experiment"],
            "config": self.config,
            "shape": None if shape is None else list(shape),
            "n_bits": objective.n_bits,
            "class_names": list(class_names or ()),
            "n_micro_batches": trainer.accumulate_grad_batches,
            "commit": self.commit,
            "dirty": self.dirty,
            "job": os.environ.get("SLURM_JOB_ID"),
        }


def experiment_of(script: str) -> str:
    """The name of the experiment that a script runs, also if a symbolic link has started it.

    ConfigError: the script lies in one clone, and has imported the packages of another.
    """
    path = Path(script).resolve()
    clone = path.parent.parent
    if clone != ROOT and (clone / THIS_FILE).is_file():
        raise ConfigError(
            f"{path} has imported the code of another clone, {ROOT}: "
            f"cd {clone} and run python -m reproduce.{path.stem}"
        )
    return path.stem


def best_precision(accelerator: str) -> str:
    """bf16-mixed if the hardware multiplies bf16, else 32-true.

    GPUs multiply bf16 from Ampere on, CPUs with AMX or AVX512-BF16.
    """
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        multiplies_bf16 = torch.cuda.is_bf16_supported()
    else:
        features = torch.cpu.get_capabilities()
        multiplies_bf16 = features.get("amx_bf16") or features.get("avx512_bf16")
    return "bf16-mixed" if multiplies_bf16 else "32-true"


def machine(trainer: L.Trainer) -> dict[str, Any]:
    """Versions, the device ('2 x NVIDIA H200', or a CPU), and whether training used TF32."""
    versions = {name: metadata.version(name) for name in PACKAGES}
    device = trainer.strategy.root_device
    on_gpu = device.type == "cuda"
    name = device_name(device)
    if on_gpu or trainer.world_size > 1:
        name = f"{trainer.world_size} x {name}"
    return {
        "versions": {"python": sys.version.split()[0], **versions},
        "device": name,
        "tf32": on_gpu and torch.backends.cudnn.allow_tf32,
    }


def device_name(device: torch.device) -> str:
    """'NVIDIA H200', or the CPU's name and threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    cpu = torch.cpu.get_capabilities().get("cpu_name", "CPU").strip()
    return f"{cpu}, {torch.get_num_threads()} threads"


def git_state() -> tuple[str | None, bool]:
    """The commit of this checkout, and whether tracked files (but generated ones) differ from it.

    (None, False) outside of a checkout. An installed copy is outside of one, even if its folder
    lies in a git repository: that is another project's.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    excluded = [f":(exclude){path}" for path in results.GENERATED]
    try:
        # Empty where this file is not tracked, and another path where ROOT is not the top.
        if git("ls-files", "--full-name", THIS_FILE) != THIS_FILE:
            return None, False
        changes = git("status", "--porcelain", "--untracked-files=no", "--", ".", *excluded)
        return git("rev-parse", "HEAD"), bool(changes)
    except (OSError, subprocess.CalledProcessError):
        return None, False
