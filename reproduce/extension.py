"""A finished run whose command is repeated: it stays as it is, or it is extended to a later end."""

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from omegaconf import DictConfig, OmegaConf

from datamodules import make_data
from lightning_modules.objective import Objective
from reproduce.config import ConfigError
from reproduce.kinds import argument_text
from reproduce.run_folder import (
    RESULT,
    SAME,
    changed_settings,
    falling_rate,
    frozen_share,
    not_a_result,
    read_result,
    step_checkpoints,
)
from reproduce.streams import say

LIMITS = ("max_steps", "max_epochs", "max_time")  # keys of the section `trainer` that end a run
# Keys that a run may change until its test, which they decide.
OF_TEST = (
    "eval.noise_samples",
    "eval.bn_images",
    "checkpoint.select",
    "trainer.limit_test_batches",
)
SECONDS = (86_400, 3_600, 60, 1)  # of the parts of max_time, DD:HH:MM:SS


def check_finished(config: DictConfig, module: Objective) -> None:
    """Decide what a finished run in the run folder does with the settings of a new command.

    With the same settings the program says that the run is finished, and ends with exit code 0.
    With more steps, epochs or time this function returns, and the run goes on. Its result.json
    stays in place until a new one replaces it. Without a finished run there is nothing to check.

    ConfigError, one line: other settings differ, or the run cannot go on.
    """
    folder = Path(config.run_dir)
    if not (folder / RESULT).is_file():
        return
    result = read_result(folder)
    trained_with = _config(folder, result)
    now = {key: config.trainer.get(key) for key in LIMITS}
    before = {key: trained_with["trainer"].get(key) for key in LIMITS}
    try:
        larger = [key for key in LIMITS if _limit(now[key]) > _limit(before[key])]
        smaller = [key for key in LIMITS if _limit(now[key]) < _limit(before[key])]
    except ValueError as error:
        raise not_a_result(folder) from error
    changed = changed_settings(trained_with, config, module)
    changed += [f"trainer.{key}={argument_text(before[key])}" for key in smaller]
    if changed:
        raise ConfigError(
            f"{folder} is finished, and was trained with {' '.join(changed)}: say the same, or "
            f"give another run_dir (with init_from={folder} it starts from these weights)"
        )
    _check_images(config, trained_with, result)
    if not larger or _has_all_steps(result, config):
        _check_test(config, trained_with)
        rank_zero_only(say)(f"{folder} is finished: see {folder / RESULT}")
        sys.exit(0)
    setting = falling_rate(config)
    if setting is not None and "max_steps" in larger:
        raise ConfigError(
            f"{folder} is finished at trainer.max_steps={before['max_steps']}, towards which "
            f"{setting} lowered the learning rate: it cannot go on; start a new run from its "
            f"weights with init_from={folder}, in another run_dir"
        )
    share = frozen_share(config)
    if share is not None and "max_steps" in larger:
        raise ConfigError(
            f"{folder} is finished at trainer.max_steps={before['max_steps']}, and {share} is a "
            f"share of them: it cannot go on; start a new run from its weights with "
            f"init_from={folder}, in another run_dir"
        )
    if not step_checkpoints(folder):
        raise ConfigError(
            f"{folder} is finished, but its step-*.ckpt, from which it would go on, are gone: "
            f"start a new run from its weights with init_from={folder}, in another run_dir"
        )
    limits = " ".join(f"trainer.{key}={argument_text(now[key])}" for key in larger)
    rank_zero_info(f"{folder} is finished, and is extended to {limits}")


def _check_test(config: DictConfig, trained_with: dict[str, Any]) -> None:
    """ConfigError: a finished run was tested with other settings. Older results may lack a key."""
    earlier = OmegaConf.create(trained_with)
    tested_with = {
        key: OmegaConf.select(earlier, key)
        for key in OF_TEST
        if key.partition(".")[2] in (earlier.get(key.partition(".")[0]) or {})
    }
    changed = [
        f"{key}={argument_text(value)}"
        for key, value in tested_with.items()
        if OmegaConf.select(config, key) != value
    ]
    if changed:
        raise ConfigError(
            f"{config.run_dir} is finished, and was tested with {' '.join(changed)}: say the same, "
            f"or test its weights again with python -m reproduce.evaluate {config.run_dir}"
        )


def _check_images(config: DictConfig, trained_with: dict[str, Any], result: dict[str, Any]) -> None:
    """ConfigError: data.root is another folder than that of a finished run, with other images.

    The images of the same folder are not looked at: they may be gone once the run is finished.
    """
    recorded = (result.get("data") or {}).get("sha256")
    if recorded is None or config.data.get("root") == trained_with["data"].get("root"):
        return
    actual = make_data(seed=config.seed, **config.data).current_hash()
    if actual != recorded:
        raise ConfigError(
            f"{config.run_dir} is finished, and was trained on other images than those in "
            f"data.root={config.data.root} (sha256 {recorded}, and here {actual}): give another "
            f"run_dir (with init_from={config.run_dir} it starts from these weights)"
        )


def earlier_ends(config: DictConfig, images: int) -> list[dict[str, Any]]:
    """The earlier ends of a run that is now trained on `images` images, the first one first.

    They are what result.json says before it is replaced; [] if the run ends for the first time.
    Each has steps, images, seconds, metrics, commit, and date: when its result was written, in UTC.
    """
    folder = Path(config.run_dir)
    path = folder / RESULT
    if not path.is_file():
        return []
    result = read_result(folder)
    ends = list(result.get("extended") or [])
    if result["images"] < images:
        written = datetime.fromtimestamp(path.stat().st_mtime, UTC)
        kept = {key: result.get(key) for key in ("images", "seconds", "metrics", "commit")}
        steps = result["images"] // config.data.batch_size
        ends.append({"steps": steps, **kept, "date": written.isoformat(timespec="seconds")})
    return ends


def _config(folder: Path, result: dict[str, Any]) -> dict[str, Any]:
    """The config in a result. ConfigError: it lacks what every result has."""
    config = result.get("config")
    needed = {*SAME, "trainer"} - {"init_from"}  # older runs have no init_from
    if not isinstance(config, dict) or not needed <= config.keys():
        raise not_a_result(folder)
    if not isinstance(config["trainer"], dict) or not isinstance(result.get("images"), int):
        raise not_a_result(folder)
    return config


def _limit(value: object) -> float:
    """A limit of training as a number; infinite where there is none.

    >>> _limit(None), _limit(-1), _limit(20), _limit("01:00:00:05")
    (inf, inf, 20.0, 86405.0)
    """
    if value is None or value == -1:
        return float("inf")
    parts = str(value).split(":")
    if len(parts) == 1:
        return float(parts[0])
    return float(sum(n * int(part) for n, part in zip(SECONDS, parts, strict=True)))


def _has_all_steps(result: dict[str, Any], config: DictConfig) -> bool:
    """Whether a run has had trainer.max_steps, so that more time or epochs change nothing."""
    steps = result["images"] // config.data.batch_size
    return 0 < config.trainer.max_steps <= steps
