"""Where metrics go: Weights & Biases, CSV files, or nowhere."""

import os
from pathlib import Path

import lightning.pytorch as L
from omegaconf import DictConfig

from reproduce.config import ConfigError


def make_logger(config: DictConfig):
    """W&B (offline where nobody is logged in, so that it never asks), CSV files, or none."""
    folder, name = Path(config.run_dir), config.logger.name
    if name == "none":
        return False
    if name == "csv":
        return L.loggers.CSVLogger(folder, name="logs")
    try:
        import wandb
    except ImportError as error:
        raise ConfigError("logger.name=wandb needs wandb: pip install wandb, or add logger.name=csv") from error
    from lightning.pytorch.loggers import WandbLogger

    mode = os.environ.get("WANDB_MODE") or ("online" if _logged_in() else "offline")
    settings = wandb.Settings(mode=mode, silent=True)
    return WandbLogger(
        name=folder.name, project=config.logger.project, group=config.experiment, save_dir=folder, settings=settings
    )


def _logged_in() -> bool:
    import netrc

    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False
