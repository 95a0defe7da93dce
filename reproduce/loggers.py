"""Where metrics go: Weights & Biases, CSV files, or nowhere."""

import os
import secrets
import shlex
import signal
import sys
import threading
from pathlib import Path

import lightning.pytorch as L
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig

from lightning_modules.callbacks.paper import COLUMNS, comparison_rows
from lightning_modules.lightning_internals import name_no_anonymous_mode
from reproduce.config import ConfigError
from reproduce.provenance import git_state
from reproduce.sweep import in_sweep
from results.files import write

STOP_WITHIN = 16.0  # seconds in which a stop that W&B wants has reached the run: wandb asks its server every 15
_stop_wanted = threading.Event()


class StepLogger(L.loggers.WandbLogger):
    """W&B with one row an optimizer step, by trainer/global_step and trainer/images (seen in training, all ranks).

    Lightning numbers the rows of training and validation one below those of callbacks, and W&B counts from 0 again in
    every offline part of a run. Here both numbers are the trainer's, so that the parts of a run follow one another.
    batch_size: the global one.
    """

    def __init__(self, batch_size: int, **arguments) -> None:
        super().__init__(**arguments)
        name_no_anonymous_mode(self)
        self.batch_size = batch_size
        self.trainer: L.Trainer | None = None
        self.first: int | None = None

    @rank_zero_only
    def log_graph(self, model: L.LightningModule, input_array=None) -> None:
        """What Lightning calls before it trains or tests: no graph is logged, but this says whose steps they are."""
        self.trainer = model.trainer

    @rank_zero_only
    def log_metrics(self, metrics: dict, step: int | None = None) -> None:
        if self.first is None:
            self.first = (
                self.experiment.step
            )  # of an online run that is resumed: W&B drops rows below it
        now = (step or 0) if self.trainer is None else self.trainer.global_step
        row = {**metrics, "trainer/global_step": now, "trainer/images": now * self.batch_size}
        self.experiment.log(row, step=max(now, self.first))


def make_logger(config: DictConfig):
    """W&B (offline where nobody is logged in, so that it never asks), CSV files, or none."""
    folder, name = Path(config.run_dir), config.logger.name
    if in_sweep() and name != "wandb":
        raise ConfigError(
            f"logger.name={name} in a W&B sweep, which needs val/*: add logger.name=wandb to its command"
        )
    if name == "none":
        return False
    if name == "csv":
        return L.loggers.CSVLogger(folder, name="logs")
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(
            "logger.name=wandb needs wandb: pip install wandb, or add logger.name=csv"
        ) from error

    _stop_wanted.clear()
    mode, (commit, _) = (
        os.environ.get("WANDB_MODE") or ("online" if _logged_in() else "offline"),
        git_state(),
    )
    return StepLogger(
        batch_size=config.data.batch_size,
        id=_wandb_id(folder),
        name=folder.name,
        project=config.logger.project,
        group=config.experiment,
        tags=[
            *([f"commit-{commit[:7]}"] if commit else []),
            *([config.preset] if config.preset else []),
        ],
        save_dir=folder,
        settings=wandb.Settings(mode=mode, silent=True, stop_fn=_stop),
    )


@rank_zero_only
def _wandb_id(folder: Path) -> str:
    """The run's id at W&B: the agent's in a sweep, else kept in the folder, so that a resumed run is the same there."""
    path = folder / "wandb-run-id.txt"
    earlier_id = path.read_text().strip() if path.is_file() else None
    run_id = os.environ["WANDB_RUN_ID"] if in_sweep() else earlier_id or secrets.token_hex(8)
    if run_id != earlier_id:
        write(path, f"{run_id}\n")
    return run_id


def report(logger, result: dict) -> None:
    """The result of a finished run at W&B; nothing with another logger. result: what result.json holds.

    The summary gets what was tested, for each claim `paper/<name>` and `gap/<name>` (tested, not of a validation),
    `status` (of the first claim) and, where the best weights were, `best/val/<name>`: `val/<name>` stays the last
    value, a number, as sweeps want it. Table `comparison` has a row a claim; the statuses become tags.
    """
    if not isinstance(logger, StepLogger):
        return
    import wandb

    run, metrics = logger.experiment, result["metrics"]
    summary = {key: value for key, value in metrics.items() if not key.startswith("val/")}
    if result["tested"]["chosen"] == "best":
        summary |= {
            f"best/{key}": value for key, value in metrics.items() if key.startswith("val/")
        }
    for comparison in result["comparisons"]:
        name = comparison["metric"].split("/")[-1]
        summary |= {f"paper/{name}": comparison["value"]}
        summary |= {f"gap/{name}": comparison["gap"]} if comparison["gap"] is not None else {}
    table = wandb.Table(columns=list(COLUMNS), data=[list(row) for row in comparison_rows(result)])
    run.log(
        {"comparison": table}, commit=True
    )  # before the summary, which a row still to be written would change
    run.summary.update({**summary, "status": result["status"]})
    statuses = dict.fromkeys(comparison["status"] for comparison in result["comparisons"])
    run.tags = (*run.tags, *(status for status in statuses if status != "-"))


def mark_preempting() -> None:
    """Tell W&B that this run is stopped from outside, so that a sweep starts it again; nothing without a run.

    Nor where W&B itself wants the stop, by a sweep's early_terminate or a person at its page: the sweep would start the
    run again and again. Its agent only sends SIGTERM, as Slurm does, so in a sweep this waits for word from W&B.
    """
    if (run := _active_run()) is None:
        return
    if not _stop_wanted.wait(STOP_WITHIN if in_sweep() and not run.offline else 0):
        run.mark_preempting()


def _stop() -> None:
    """What wandb calls, in its own thread, when the run is to stop: the same way out as for a preemption."""
    _stop_wanted.set()
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)
    else:  # Windows
        signal.raise_signal(signal.SIGTERM)


def close(exit_code: int) -> None:
    """End the W&B run, if there is one, with the process's exit code; of an offline one say how to upload it.

    exit_code: 0 means finished, also to a sweep; anything else failed or, after mark_preempting, preempted.
    """
    if (run := _active_run()) is None:
        return
    offline, folder = run.offline, run.settings.wandb_dir
    sys.modules["wandb"].finish(exit_code=exit_code)
    if offline:  # every part of a resumed run: they have the same id, and are uploaded in the order of their start
        print(
            f"W&B was offline; upload this run with: wandb sync {shlex.quote(folder)}/offline-run-*"
        )


def _active_run():
    return getattr(sys.modules.get("wandb"), "run", None)


def _logged_in() -> bool:
    import netrc

    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False
