"""What a number rests on: commit, versions, device, precision."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import lightning.pytorch as L
import torch
from omegaconf import DictConfig, OmegaConf

from lightning_modules.objective import Objective

ROOT = Path(__file__).resolve().parent.parent
THIS_FILE = "reproduce/provenance.py"
PACKAGES = ("torch", "lightning", "torchmetrics", "torchvision", "omegaconf", "numpy")


class Provenance(L.Callback):
    """Writes the config into the run folder, and into every checkpoint, as plain dicts, with whose and what it is."""

    def __init__(self, config: DictConfig) -> None:
        self.commit, self.dirty = git_state()
        self.config = OmegaConf.to_container(config)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """From here on the folder holds a run: the data have been found and everything has been built."""
        if trainer.is_global_zero:
            Path(self.config["run_dir"], "config.yaml").write_text(OmegaConf.to_yaml(self.config))
        if trainer.logger is not None:
            trainer.logger.log_hyperparams(self.config)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: Objective, checkpoint: dict
    ) -> None:
        checkpoint["paperflows"] = {
            "experiment": self.config["experiment"],
            "config": self.config,
            "shape": None if pl_module.shape is None else list(pl_module.shape),
            "n_micro_batches": trainer.accumulate_grad_batches,
            "commit": self.commit,
            "dirty": self.dirty,
            "job": os.environ.get("SLURM_JOB_ID"),
        }


def best_precision(accelerator: str) -> str:
    """bf16-mixed where the hardware multiplies bf16 (GPU; CPU with AMX or AVX512-BF16), else 32-true."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "32-true"
    able = torch.cpu.get_capabilities()
    return "bf16-mixed" if able.get("amx_bf16") or able.get("avx512_bf16") else "32-true"


def machine(trainer: L.Trainer) -> dict:
    """Versions, device ('2 x NVIDIA H200', or the CPU's name and threads) and whether TF32 was on in training."""
    versions = {"python": sys.version.split()[0]} | {
        name: metadata.version(name) for name in PACKAGES
    }
    cuda = trainer.strategy.root_device.type == "cuda"
    processes = f"{trainer.world_size} x " if cuda or trainer.world_size > 1 else ""
    device = f"{processes}{device_name(trainer.strategy.root_device)}"
    return {
        "versions": versions,
        "device": device,
        "tf32": cuda and torch.backends.cudnn.allow_tf32,
    }


def device_name(device: torch.device) -> str:
    """'NVIDIA H200', or the CPU's name and threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"{torch.cpu.get_capabilities().get('cpu_name', 'CPU').strip()}, {torch.get_num_threads()} threads"


def git_state() -> tuple[str | None, bool]:
    """The commit of this checkout and whether tracked files differ from it; (None, False) outside of one.

    An installed copy is outside of one, even where its folder lies in a repository: that one is another project's.
    """

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        if (
            git("ls-files", "--full-name", THIS_FILE) != THIS_FILE
        ):  # not tracked, or not from ROOT on
            return None, False
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return None, False
