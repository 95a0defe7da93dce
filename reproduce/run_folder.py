"""A run's folder: outputs/<experiment>/<run id>/, with its config, log, checkpoints and result."""

import contextlib
import inspect
import json
import logging
import re
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import IO, Any, cast

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from lightning_modules.checkpoint_io import PART
from lightning_modules.objective import Objective
from reproduce.config import ConfigError
from reproduce.kinds import argument_text
from results.runs import read_curve

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

Checkpoint = dict[str, Any]
RESULT = "result.json"
DIVERGED = "diverged.json"  # in the place of result.json where too many steps were not finite
BEST = "best.ckpt"
ADVICE = "Lower optim.lr, lengthen optim.warmup_steps or set optim.clip_norm, in a new run_dir"
# What a run writes into its folder before it begins. The lock comes last: see leave_no_empty_run.
BEFORE_A_RUN = ("log.txt", "wandb-run-id.txt", "lock")


def holds_run(folder: Path) -> bool:
    """Whether a folder holds a run, finished or not: its curve exists from step 0 on."""
    files = (folder / "curve.csv", folder / RESULT, best_checkpoint(folder))
    return any(path.is_file() for path in files) or bool(step_checkpoints(folder))


def check_run_dir(config: DictConfig) -> None:
    """ConfigError: the run would be mixed with another one in its folder.

    Whether the settings are those of the run in the folder is checked later, when the model is
    known: by `check_finished` for a finished run, and by `check_checkpoint` for any other.
    """
    folder = Path(config.run_dir)
    if any(folder.glob("hpc_ckpt_*")):  # Lightning would load the newest of them, unasked
        raise ConfigError(
            f"{folder} holds hpc_ckpt_*.ckpt of another program: give another run_dir"
        )
    if not holds_run(folder):
        return
    if config.resume is None:
        raise ConfigError(
            f"{folder} holds a run: add resume=auto to go on with it, or give another run_dir"
        )
    if (folder / RESULT).is_file():
        experiment = result_text(folder, "experiment")
        if experiment != config.experiment:
            raise ConfigError(
                f"{folder} holds a finished run of {experiment}: give another run_dir"
            )
        return
    if step_checkpoints(folder) or not best_checkpoint(folder).is_file():
        return  # a run continues from its checkpoints alone: its curve may be damaged
    rows = read_curve(folder / "curve.csv")
    last_step = max((int(row.get("step") or 0) for row in rows), default=0)
    if last_step >= config.checkpoint.every_n_steps:
        raise ConfigError(
            f"{folder} holds the curve of {last_step} steps, but its step-*.ckpt are gone: "
            f"give another run_dir, or copy its {BEST} to step-00000000.ckpt to go on from that"
        )


def read_result(folder: Path) -> dict[str, Any]:
    """The content of a finished run's result.json. ConfigError: it is not the result of a run."""
    try:
        content = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    except (ValueError, RecursionError):  # the file is not JSON, or not text
        content = None
    if not isinstance(content, dict):
        raise not_a_result(folder)
    return content


def not_a_result(folder: Path) -> ConfigError:
    """The error for a result.json without what every result has."""
    return ConfigError(
        f"{folder / RESULT} is not the result of a run: delete it, and resume=auto goes on "
        "from the newest checkpoint"
    )


def result_text(folder: Path, key: str) -> str:
    """The text of a key in a finished run's result.json. ConfigError: there is no such text."""
    value = read_result(folder).get(key)
    if not isinstance(value, str):
        raise not_a_result(folder)
    return value


def row_name(folder: Path) -> str:
    """What a run is called where it is recorded: its folder's name as a name of a file and a link.

    >>> [row_name(Path(name)) for name in ("outputs/seed0", "my first run (2)", ".-")]
    ['seed0', 'my-first-run-2', 'run']
    """
    name = re.sub(r"[^\w.+-]+", "-", folder.resolve().name)
    return name.strip("-.+") or "run"


@rank_zero_only
def open_folder(folder: Path) -> None:
    """Make a run's folder, lock it for the life of this process, and log messages to its log.txt.

    ConfigError: another process has locked the folder.
    """
    is_new = not folder.exists()
    missing = [name for name in BEFORE_A_RUN if not (folder / name).exists()]
    folder.mkdir(parents=True, exist_ok=True)
    _lock(folder)
    for part in (folder / "checkpoints").glob(f"*{PART}"):
        part.unlink()  # a run was killed while it saved
    log = logging.getLogger("lightning.pytorch")
    for old in [h for h in log.handlers if isinstance(h, logging.FileHandler)]:
        log.removeHandler(old)  # an earlier run of this process had it
    handler = LogFile(folder / "log.txt", missing, is_new)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.addHandler(handler)


def leave_no_empty_run() -> None:
    """Remove what this process has written into its newest folder, where it has begun no run there.

    A setting that is refused after the folder was opened leaves a lock and a log, and no more.
    Files that were there before stay, and so does everything if the folder holds any other file.
    The lock is removed last, and only empty folders are, so that nothing is lost of a run that
    another process begins there at this moment.
    """
    log = logging.getLogger("lightning.pytorch")
    for handler in [h for h in log.handlers if isinstance(h, LogFile)]:
        folder = Path(handler.baseFilename).parent
        own = [folder / name for name in handler.made]
        if any(path not in own for path in folder.rglob("*") if not path.is_dir()):
            continue
        log.removeHandler(handler)
        handler.close()
        with contextlib.suppress(OSError):
            for path in own:
                path.unlink(missing_ok=True)
            if handler.is_new:
                for path in sorted(folder.rglob("*"), reverse=True):  # the inner ones first
                    path.rmdir()
                folder.rmdir()


class LogFile(logging.FileHandler):
    """A log file that loses messages on a full disk, instead of printing a traceback for each.

    The next checkpoint or curve cannot be written either, and ends the run with one line.

    Args:
        path: of the file.
        made: names of files in its folder that this process makes.
        is_new: whether this process has made the folder.
    """

    def __init__(self, path: Path, made: Sequence[str], is_new: bool) -> None:
        super().__init__(path)
        self.made = made
        self.is_new = is_new

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def _lock(folder: Path) -> None:
    """Lock a folder as long as this process lives. ConfigError: another process has locked it.

    A lock by fcntl.lockf ends with its process, even if that is killed, and forked workers do not
    inherit it. Other locks lack one of the two: workers of a killed run would keep a flock, and a
    lock file would stay behind. On Windows, which has no fcntl, and on a file system without locks
    a folder is not locked.
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


HELD: dict[Path, IO[str]] = {}  # the open lock files of this process


def best_checkpoint(folder: Path) -> Path:
    """The path of the checkpoint with the weights that were the best by validation."""
    return folder / "checkpoints" / BEST


def step_checkpoints(folder: Path) -> list[Path]:
    """The periodic checkpoints of a run folder, the newest first."""
    return sorted((folder / "checkpoints").glob("step-*.ckpt"), reverse=True)


def newest_checkpoint(folder: Path) -> tuple[Path, Checkpoint] | None:
    """The newest checkpoint of a run folder that loads, and its content; None if it has none.

    If the run ended before its first periodic checkpoint, the best one is taken. Damaged ones are
    skipped, with a message. ValueError, one line: there are checkpoints, but none loads.
    """
    damaged: list[str] = []
    best = best_checkpoint(folder)
    paths = step_checkpoints(folder)
    if not paths and best.is_file():
        rank_zero_info(f"{best.parent} holds no step-*.ckpt yet: taking {BEST}")
        paths = [best]
    for path in paths:
        try:
            checkpoint = read_checkpoint(path)
        except ValueError:
            damaged.append(path.name)
            continue
        if damaged:
            names = ", ".join(damaged)
            rank_zero_info(f"{names} in {path.parent} is damaged: taking {path.name} before it")
        return path, checkpoint
    if damaged:
        names = ", ".join(damaged)
        raise ValueError(
            f"no checkpoint in {folder / 'checkpoints'} loads ({names} damaged): "
            "give another run_dir"
        )
    return None


def selected_weights(folder: Path, select: str) -> tuple[Path, Checkpoint]:
    """The checkpoint to test: the best by validation if `select` is `best`, else the newest.

    The newest also stands in for a best one that is missing or damaged. ValueError: there is none.
    """
    best = best_checkpoint(folder)
    if select == "best" and best.is_file():
        try:
            return best, read_checkpoint(best)
        except ValueError:
            rank_zero_info(f"{best} is damaged: taking the newest in its place")
    newest = newest_checkpoint(folder)
    if newest is None:
        raise ValueError(f"{folder} holds no checkpoint: no step of the run was finite. {ADVICE}")
    return newest


def read_checkpoint(path: Path) -> Checkpoint:
    """As `load_checkpoint`, for a run that goes on: a message says what to do in its folder."""
    try:
        return load_checkpoint(path)
    except ValueError as error:
        raise ValueError(
            f"{error}: delete it to continue from another one, or to start anew"
        ) from error


def load_checkpoint(path: Path) -> Checkpoint:
    """Load a checkpoint of this repository onto the CPU: plain tensors and dicts, no code.

    ValueError, one line without advice: it is damaged, of another kind or program, or no file (a
    folder, or a link that leads nowhere). FileNotFoundError: nothing has that name.
    """
    if not path.is_file() and (path.is_symlink() or path.exists()):
        raise ValueError(f"{path} is no file")
    if not _is_archive(path):
        kind = "is damaged" if path.suffix == ".ckpt" else "is no checkpoint"
        raise ValueError(f"{path} {kind}")
    try:
        _check_sums(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is damaged or not of this repository") from error
    if not _is_ours(checkpoint):
        raise ValueError(f"{path} is no checkpoint of this repository")
    return checkpoint


def _is_ours(checkpoint: object) -> bool:
    """Whether what a file holds is a checkpoint of this repository."""
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        return False
    origin = checkpoint.get("paperflows")
    return isinstance(origin, dict) and "experiment" in origin


def _is_archive(path: Path) -> bool:
    """Whether a file begins as a zip archive does, such as every checkpoint; maybe a cut one."""
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def _check_sums(path: Path) -> None:
    """BadZipFile: a checksum in the file is wrong. torch.load itself does not check them."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(damaged)


# A resumed run must share the sections of SAME with its first part, except for the keys of FREE,
# which may differ.
SAME = ("flow", "data", "optim", "ema", "eval", "seed", "init_from")
FREE = (
    "root",
    "cache",
    "download",
    "num_workers",
    "micro_batch",
    "bn_images",
    "noise_samples",
    "max_skipped",
)


def check_checkpoint(
    path: Path, checkpoint: Checkpoint, config: DictConfig, module: Objective, n_micro_batches: int
) -> None:
    """ConfigError, one line: a run with these settings cannot continue from a checkpoint.

    The message names what differs.

    Args:
        path: of the checkpoint, for the message.
        checkpoint: its content.
        config: of the run that would continue.
        module: of the same run; the checkpoint's weights have to fit it.
        n_micro_batches: how many micro-batches a process accumulates in a step. Lightning counts
            an epoch in them.
    """
    origin = checkpoint["paperflows"]
    if origin["experiment"] != config.experiment:
        raise ConfigError(
            f"{path} is of {origin['experiment']}, not of {config.experiment}: give another run_dir"
        )
    changed = changed_settings(origin["config"], config, module)
    last = origin["config"].get("trainer", {}).get("max_steps")
    by_end = falling_rate(config) or frozen_share(config)
    if by_end is not None and last not in (None, config.trainer.max_steps):
        changed.append(f"trainer.max_steps={last}")
    if changed:
        raise ConfigError(
            f"{path} was trained with {' '.join(changed)}: say the same, or give another run_dir"
        )
    earlier_number = origin.get("n_micro_batches", 1)
    if earlier_number != n_micro_batches:
        raise ConfigError(
            f"{path} was trained with {earlier_number} micro-batches a step and process, "
            f"now there are {n_micro_batches}: "
            "change data.micro_batch, or the number of processes"
        )
    problem = mismatch(checkpoint["state_dict"], module.state_dict())
    if problem:
        raise ConfigError(
            f"{path} {problem}; give another run_dir, or use its commit {origin['commit']}"
        )


def changed_settings(
    earlier: dict[str, Any],
    config: DictConfig,
    module: Objective,
    sections: Sequence[str] = SAME,
) -> list[str]:
    """The settings of an earlier part of a run that a later part lacks, each as `key=value`.

    Args:
        earlier: the config of the earlier part.
        config: of the later part.
        module: of the later part, whose constructors give the defaults.
        sections: the sections of a config that are compared.
    """
    trained_with = _settings(earlier, module, sections)
    settings = _settings(cast(dict[str, Any], OmegaConf.to_container(config)), module, sections)
    return [
        f"{key}={argument_text(trained_with.get(key))}"
        for key in sorted(trained_with | settings)
        if trained_with.get(key) != settings.get(key)
    ]


def falling_rate(config: DictConfig) -> str | None:
    """The setting, as `key=value`, by which the learning rate falls to 0 at trainer.max_steps."""
    for key, without in (("schedule", "constant"), ("cooldown_steps", 0)):
        value = config.optim.get(key, without)
        if value != without:
            return f"optim.{key}={value}"
    return None


def frozen_share(config: DictConfig) -> str | None:
    """The setting, as `key=value`, by which an encoder is frozen for a share of the steps."""
    share = config.optim.get("encoder_frozen_until", 0)
    if 0 < share < 1:
        return f"optim.encoder_frozen_until={share}"
    return None


def _settings(
    config: dict[str, Any], module: Objective, sections: Sequence[str]
) -> dict[str, object]:
    """The values of some sections of a config, by dotted key, without those that may change.

    A checkpoint may be older than a key of the recipe. The key then has the constructor's default,
    with which the run was trained, or null.
    """
    settings = _defaults(module)
    for section in sections:
        settings |= _flat(config.get(section), section)
    return settings


def _defaults(module: Objective) -> dict[str, object]:
    """The defaults of the constructors to which a recipe's sections go, by dotted key."""
    defaults: dict[str, object] = {}
    for section, kind in module.constructors().items():
        for base in reversed(kind.__mro__):  # a constructor may hand other arguments to its base
            constructor = base.__init__  # type: ignore[misc]  # of a class, not of an instance
            parameters = inspect.signature(constructor).parameters
            for name, parameter in parameters.items():
                if parameter.default is not parameter.empty and name not in FREE:
                    defaults[f"{section}.{name}"] = _config_value(parameter.default)
    return defaults


def _config_value(default: object) -> object:
    return list(default) if isinstance(default, tuple) else default


def mismatch(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str | None:
    """What is wrong with the first weight that is missing or has another shape; None: all fit."""
    for key in sorted({*weights, *expected}):
        stored = _shape(weights, key)
        needed = _shape(expected, key)
        if stored != needed:
            return f"does not fit this flow: {key} is {stored} there and {needed} here"
    return None


def _shape(weights: Mapping[str, Tensor], key: str) -> tuple[int, ...] | None:
    return tuple(weights[key].shape) if key in weights else None


def _flat(value: object, key: str) -> dict[str, object]:
    """The values of a section by dotted key, without the keys that a resumed run may change."""
    if not isinstance(value, dict):
        return {key: value}
    flat: dict[str, object] = {}
    for name, part in value.items():
        if name not in FREE:
            flat |= _flat(part, f"{key}.{name}")
    return flat
