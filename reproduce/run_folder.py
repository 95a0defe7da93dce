"""A run's folder: outputs/<experiment>/<run id>/ with its config, log, curve, samples, checkpoints and result."""

import json
import logging
import os
import secrets
import sys
import time
from importlib import import_module
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from reproduce.config import ConfigError


def run_id() -> str:
    """Made once and handed to other ranks by environment; under SLURM it is the job's, also after a requeue."""
    if "SLURM_JOB_ID" in os.environ:
        array = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
        return "slurm-" + ("_".join(array) if all(array) else os.environ["SLURM_JOB_ID"])
    if "LOCAL_RANK" not in os.environ or "PAPERFLOWS_RUN_ID" not in os.environ:  # the process that starts the others
        os.environ["PAPERFLOWS_RUN_ID"] = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    return os.environ["PAPERFLOWS_RUN_ID"]


def check_run_dir(config: DictConfig) -> None:
    """Refuse to mix two runs in one folder; end with 0 where the run in it is finished."""
    folder = Path(config.run_dir)
    if not (folder / "curve.csv").is_file() and newest_checkpoint(folder) is None:
        return  # nothing was trained there
    if config.resume is None:
        raise ConfigError(f"{folder} holds a run: add resume=auto to go on with it, or give another run_dir")
    if (folder / "result.json").is_file():
        print(f"{folder} is finished: see {folder / 'result.json'}")
        sys.exit(0)


@rank_zero_only
def open_folder(folder: Path) -> None:
    """Make it, and write Lightning's and our messages into its log.txt from now on."""
    folder.mkdir(parents=True, exist_ok=True)
    log, handler = logging.getLogger("lightning.pytorch"), logging.FileHandler(folder / "log.txt")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    for old in [h for h in log.handlers if isinstance(h, logging.FileHandler)]:
        log.removeHandler(old)  # of an earlier run in this process
    log.addHandler(handler)


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the highest step in a run folder, or None."""
    return max((folder / "checkpoints").glob("step-*.ckpt"), default=None)


def selected_weights(folder: Path, select: str) -> Path:
    """The checkpoint that is tested: `best` by validation if there is one, else the newest."""
    best = folder / "checkpoints" / "best.ckpt"
    return best if select == "best" and best.is_file() else newest_checkpoint(folder)


def read_checkpoint(path: Path) -> dict:
    """A checkpoint of ours on the CPU, plain tensors and dicts only. ValueError, one line: unreadable or not ours."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["paperflows"]["experiment"], checkpoint["state_dict"]
    except OSError:
        raise
    except Exception as error:
        raise ValueError(
            f"{path} is damaged or not of this repository: delete it to go on from another, or to begin"
        ) from error
    return checkpoint


SAME = ("flow", "data", "optim", "ema", "eval", "seed")  # what a resumed run must have in common with its first part
FREE = ("root", "download", "num_workers", "bn_images")  # but these


def check_checkpoint(path: Path, config: DictConfig) -> None:
    """ConfigError, one line that names the keys, where a run would not go on as it began."""
    there, here = read_checkpoint(path)["paperflows"], OmegaConf.to_container(config)
    if there["experiment"] != config.experiment:
        raise ConfigError(f"{path} is of {there['experiment']}, not of {config.experiment}: give another run_dir")
    was, now = (dict(pair for key in SAME for pair in _flat(c[key], key)) for c in (there["config"], here))
    changed = [f"{key}={was.get(key)}" for key in sorted(was | now) if was.get(key) != now.get(key)]
    if changed:
        raise ConfigError(f"{path} was trained with {' '.join(changed)}: say the same, or give another run_dir")


def _flat(value, key: str) -> list[tuple[str, object]]:
    """Dotted keys and values of a section, without those that a resumed run may change."""
    if not isinstance(value, dict):
        return [(key, value)]
    return [pair for k, v in value.items() if k not in FREE for pair in _flat(v, f"{key}.{k}")]


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
