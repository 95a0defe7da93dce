"""A run's folder: outputs/<experiment>/<run id>/ with its config, log, curve, samples, checkpoints and result."""

import inspect
import json
import logging
import sys
import zipfile
from importlib import import_module
from pathlib import Path
from typing import IO

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from omegaconf import DictConfig, OmegaConf

from lightning_modules.checkpoint_io import PART
from lightning_modules.objective import Objective
from reproduce.config import ConfigError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

DIVERGED = "diverged.json"  # in the place of result.json where too many steps were not finite


def holds_run(folder: Path) -> bool:
    """Whether something was trained there: a run has a curve from step 0 on."""
    return (folder / "curve.csv").is_file() or bool(step_checkpoints(folder))


def check_run_dir(config: DictConfig) -> None:
    """Refuse to mix two runs in one folder; end with 0 where the run in it is finished."""
    folder = Path(config.run_dir)
    if any(folder.glob("hpc_ckpt_*")):  # Lightning would take the newest of them, whosever it is
        raise ConfigError(
            f"{folder} holds hpc_ckpt_*.ckpt of another program: give another run_dir"
        )
    if not holds_run(folder):
        return
    if config.resume is None:
        raise ConfigError(
            f"{folder} holds a run: add resume=auto to go on with it, or give another run_dir"
        )
    if (folder / "result.json").is_file():
        experiment = json.loads((folder / "result.json").read_text())["experiment"]
        if experiment != config.experiment:
            raise ConfigError(
                f"{folder} holds a finished run of {experiment}: give another run_dir"
            )
        rank_zero_only(print)(f"{folder} is finished: see {folder / 'result.json'}")
        sys.exit(0)


@rank_zero_only
def open_folder(folder: Path) -> None:
    """Make it and hold it as long as this process lives; write Lightning's and our messages into its log.txt.

    ConfigError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _lock(folder)
    for part in (folder / "checkpoints").glob(f"*{PART}"):
        part.unlink()  # of a run that was killed while it saved
    log, handler = logging.getLogger("lightning.pytorch"), logging.FileHandler(folder / "log.txt")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    for old in [h for h in log.handlers if isinstance(h, logging.FileHandler)]:
        log.removeHandler(old)  # of an earlier run in this process
    log.addHandler(handler)


def _lock(folder: Path) -> None:
    """Hold a folder as long as this process lives. ConfigError: another one holds it.

    A lock by fcntl goes with its process, also with one that is killed, and forked workers do not inherit it. Nothing
    else has both: `filelock` takes flock, which workers of a killed run would still hold, and where that is missing a
    file that a killed run leaves behind. So on Windows, and on a file system without locks, nothing is held.
    """
    if fcntl is None:
        return
    HELD[folder] = (folder / "lock").open("a")
    try:
        fcntl.lockf(HELD[folder], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise ConfigError(
            f"{folder} is in use by a run that has not ended: give another run_dir"
        ) from error
    except OSError:
        pass  # a file system without locks


HELD: dict[Path, IO] = {}  # lock files of this process


def step_checkpoints(folder: Path) -> list[Path]:
    """The periodic checkpoints of a run folder, the newest first."""
    return sorted((folder / "checkpoints").glob("step-*.ckpt"), reverse=True)


def newest_checkpoint(folder: Path) -> tuple[Path, dict] | None:
    """The newest checkpoint of a run folder that loads, and its content; None where there are none.

    Says which ones it passed over. ValueError, one line: there are some, but none loads.
    """
    damaged = []
    for path in step_checkpoints(folder):
        try:
            checkpoint = read_checkpoint(path)
        except ValueError:
            damaged.append(path.name)
            continue
        if damaged:
            rank_zero_info(
                f"{', '.join(damaged)} in {path.parent} is damaged: taking {path.name} before it"
            )
        return path, checkpoint
    if damaged:
        raise ValueError(
            f"no checkpoint in {folder / 'checkpoints'} loads ({', '.join(damaged)} damaged): give another run_dir"
        )
    return None


def selected_weights(folder: Path, select: str) -> tuple[Path, dict]:
    """The checkpoint that is tested: `best` by validation if there is one, else the newest. ValueError: none."""
    best = folder / "checkpoints" / "best.ckpt"
    if select == "best" and best.is_file():
        try:
            return best, read_checkpoint(best)
        except ValueError:
            rank_zero_info(f"{best} is damaged: taking the newest in its place")
    newest = newest_checkpoint(folder)
    if newest is None:
        raise ValueError(f"{folder} holds no checkpoint: no step of the run was finite")
    return newest


def read_checkpoint(path: Path) -> dict:
    """A checkpoint of ours on the CPU, plain tensors and dicts only. ValueError, one line: unreadable or not ours."""
    try:
        with zipfile.ZipFile(path) as archive:
            if (
                part := archive.testzip()
            ) is not None:  # torch does not look at the checksums that it writes
                raise zipfile.BadZipFile(part)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["paperflows"]["experiment"], checkpoint["state_dict"]
    except OSError:
        raise
    except Exception as error:
        raise ValueError(
            f"{path} is damaged or not of this repository: delete it to go on from another, or to begin"
        ) from error
    return checkpoint


SAME = (
    "flow",
    "data",
    "optim",
    "ema",
    "eval",
    "seed",
)  # what a resumed run must have in common with its first part
FREE = (
    "root",
    "download",
    "num_workers",
    "micro_batch",
    "bn_images",
    "noise_samples",
    "max_skipped",
)  # but these


def check_checkpoint(
    path: Path, checkpoint: dict, config: DictConfig, module: Objective, n_micro_batches: int
) -> None:
    """ConfigError, one line that names what differs, where a run would not go on as it began.

    n_micro_batches: a process accumulates in a step; Lightning counts an epoch in them.
    """
    origin = checkpoint["paperflows"]
    if origin["experiment"] != config.experiment:
        raise ConfigError(
            f"{path} is of {origin['experiment']}, not of {config.experiment}: give another run_dir"
        )
    trained_with, wanted = (
        _settings(c, module) for c in (origin["config"], OmegaConf.to_container(config))
    )
    keys = sorted(trained_with | wanted)
    changed = [
        f"{key}={trained_with.get(key)}" for key in keys if trained_with.get(key) != wanted.get(key)
    ]
    if changed:
        raise ConfigError(
            f"{path} was trained with {' '.join(changed)}: say the same, or give another run_dir"
        )
    if (before := origin.get("n_micro_batches", 1)) != n_micro_batches:
        raise ConfigError(
            f"{path} was trained with {before} micro-batches a step and process, now there are {n_micro_batches}: "
            "change data.micro_batch, or the number of processes"
        )
    if mismatch := _mismatch(checkpoint["state_dict"], module.state_dict()):
        raise ConfigError(
            f"{path} {mismatch}; give another run_dir, or use its commit {origin['commit']}"
        )


def _settings(config: dict, module: Objective) -> dict[str, object]:
    """The values of a config that a resumed run must have in common with its first part, by dotted key.

    A key that the recipe of then did not have is the constructor's default, with which that run was trained.
    """
    return _defaults(module) | dict(
        pair for section in SAME for pair in _flat(config[section], section)
    )


def _defaults(module: Objective) -> dict[str, object]:
    """Dotted key -> default, of the constructors to which a recipe's sections go."""
    defaults = {}
    for section, kind in module.constructors().items():
        for base in reversed(kind.__mro__):  # a constructor may hand on what it does not name
            for name, parameter in inspect.signature(base.__init__).parameters.items():
                if parameter.default is not parameter.empty and name not in FREE:
                    value = parameter.default
                    defaults[f"{section}.{name}"] = (
                        list(value) if isinstance(value, tuple) else value
                    )
    return defaults


def _mismatch(weights: dict, expected: dict) -> str | None:
    """The first weight that one of the two has not, or in another shape, in words."""
    keys = [k for k in sorted(weights | expected) if _shape(weights, k) != _shape(expected, k)]
    if not keys:
        return None
    stored, needed = _shape(weights, keys[0]), _shape(expected, keys[0])
    return f"does not fit this flow: {keys[0]} is {stored} there and {needed} here"


def _shape(weights: dict, key: str) -> tuple[int, ...] | None:
    return tuple(weights[key].shape) if key in weights else None


def _flat(value, key: str) -> list[tuple[str, object]]:
    """Dotted keys and values of a section, without those that a resumed run may change."""
    if not isinstance(value, dict):
        return [(key, value)]
    return [pair for k, v in value.items() if k not in FREE for pair in _flat(v, f"{key}.{k}")]


def load_flow(folder: str | Path):
    """The flow of a finished or running run, or of one checkpoint file, in eval mode on the CPU.

    A learned dequantiser stays behind: with the flow alone, data are dequantised uniformly. Batch-norm statistics are
    the running ones. ValueError or FileNotFoundError, one line: nothing there to load.
    """
    return read_run(folder)[0]


def read_run(folder: str | Path):
    """The flow as `load_flow` gives it, and what its checkpoint says of the run: experiment, config, shape, commit.

    Under `parts` it also names the parts of the module that have weights or buffers, as "flow" and "dequantizer".
    """
    path = Path(folder)
    finished = path / "result.json"
    if path.is_dir() and not finished.is_file():
        newest = newest_checkpoint(path)
        if newest is None:
            raise FileNotFoundError(
                f"{path} holds no checkpoint: give the folder of a run, outputs/<experiment>/<run id>"
            )
        path, checkpoint = newest
    else:
        path = path / json.loads(finished.read_text())["checkpoint"] if path.is_dir() else path
        checkpoint = read_checkpoint(path)
    origin = checkpoint["paperflows"]
    script = import_module(f"reproduce.{origin['experiment']}")
    if not hasattr(script, "make_flow"):
        raise ConfigError(
            f"{path} is of {origin['experiment']}, which trains no flow: there is none to load"
        )
    flow = script.make_flow(OmegaConf.create(origin["config"]), origin["shape"])
    weights = {f"flow.{key}": value for key, value in flow.state_dict().items()}
    stored = {
        key: value for key, value in checkpoint["state_dict"].items() if key.startswith("flow.")
    }
    if mismatch := _mismatch(stored, weights):
        raise ConfigError(f"{path} {mismatch}; use its commit {origin['commit']}")
    flow.load_state_dict({key.removeprefix("flow."): value for key, value in stored.items()})
    parts = sorted({key.partition(".")[0] for key in checkpoint["state_dict"]})
    return flow.eval(), {**origin, "parts": parts}
