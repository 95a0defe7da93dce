"""Where metrics go: Weights & Biases, CSV files, or nowhere."""

from __future__ import annotations

import contextlib
import http.client
import netrc
import os
import secrets
import shlex
import signal
import ssl
import sys
import textwrap
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args
from urllib.parse import urlsplit

import lightning.pytorch as L
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from omegaconf import DictConfig
from torch import nn

from lightning_modules.callbacks.curve import Curve
from lightning_modules.callbacks.paper import (
    COLUMNS,
    comparison_rows,
    notes_of,
    short_name,
)
from lightning_modules.lightning_internals import callbacks_of, name_no_anonymous_mode
from reproduce.config import ConfigError
from reproduce.provenance import git_state
from reproduce.streams import say
from reproduce.sweep import in_sweep
from results import is_number
from results.files import write

if TYPE_CHECKING:
    import wandb

# wandb asks its server every 15 seconds whether the run is to stop. So a stop that a sweep or a
# person asks for reaches the run within this many seconds.
STOP_WITHIN = 16.0
ANSWER_WITHIN = 10.0  # seconds in which W&B's server has to answer before a run begins
INIT_WITHIN = 60.0  # seconds in which it has to accept a new run
CLOUD = "api.wandb.ai"  # the host name under which ~/.netrc may hold a login for W&B's own server
SHORTEST_KEY = 40  # letters of a key of W&B, without a prefix that ends with a dash
_stop_wanted = threading.Event()
Mode = Literal["online", "offline", "shared", "disabled", "dryrun", "run"]


class StepLogger(WandbLogger):
    """A logger for W&B with one row for each optimizer step. No failure of W&B ends the run.

    Each row has trainer/global_step, trainer/images (images seen in training, over all ranks) and
    trainer/seconds (of the run, including those before a resume, as in curve.csv). The number of a
    row is the trainer's step. (Lightning would number the rows of training and
    validation one below those of callbacks, and W&B would count from 0 again in every offline part
    of a run, so that the parts would not follow one another.)

    A run is logged offline if W&B's server does not accept it. If wandb's own process ends during
    the run, one line says so, and the run continues without W&B.

    Args:
        batch_size: images in an optimizer step, over all ranks.
        settings: wandb's settings.
        sends_weights: whether `report` sends the tested weights.
        arguments: those of Lightning's logger.
    """

    def __init__(
        self,
        batch_size: int,
        settings: wandb.Settings,
        sends_weights: bool = False,
        **arguments: Any,
    ) -> None:
        super().__init__(settings=settings, **arguments)
        name_no_anonymous_mode(self)
        self.batch_size = batch_size
        self.sends_weights = sends_weights
        self.settings = settings
        self.trainer: L.Trainer | None = None
        self.first_step: int | None = None
        self.lost = False

    @property
    def experiment(self) -> wandb.Run:
        """The run at W&B, which begins at the first access. ConfigError: wandb does not start."""
        try:
            return super().experiment
        except Exception as error:  # as in `tell`
            _clear()
            if self.settings.mode == "offline":
                raise ConfigError(
                    f"wandb does not start ({_first_line(error)}): add logger.name=csv"
                ) from error
            _say_offline(_first_line(error))
        self.settings.mode = "offline"
        return self.experiment

    @rank_zero_only
    def log_graph(self, model: nn.Module, input_array: object = None) -> None:
        """Remember the trainer, whose steps number the rows. No graph is logged.

        Lightning calls this method before it trains or tests.
        """
        self.trainer = cast(L.LightningModule, model).trainer

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        """Send the run's config."""
        log = super().log_hyperparams
        self.tell(lambda run: log(params))

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Send one row, numbered by the trainer's step; by `step` if no trainer is known yet."""
        number = step or 0
        row = dict(metrics)
        if self.trainer is not None:
            number = self.trainer.global_step
            for callback in callbacks_of(self.trainer):
                if isinstance(callback, Curve):
                    row["trainer/seconds"] = round(callback.seconds, 1)
        row["trainer/global_step"] = number
        row["trainer/images"] = number * self.batch_size
        self.tell(lambda run: self._log(run, row, number))

    def _log(self, run: wandb.Run, row: dict[str, Any], step: int) -> None:
        if self.first_step is None:
            self.first_step = run.step  # of a resumed online run; W&B drops rows with lower numbers
        run.log(row, step=max(step, self.first_step))

    def tell(self, action: Callable[[wandb.Run], None]) -> None:
        """Call `action` with the run. If wandb fails, say so, and do not use it any more."""
        if self.lost:
            return
        run = self.experiment
        try:
            action(run)
        except Exception as error:  # a dead wandb process raises errors without a common class
            self.lost = True
            _give_up(error)


def make_logger(config: DictConfig) -> Logger | bool:
    """The logger that `logger.name` asks for; False for none.

    W&B is offline if nobody is logged in, so that it never asks for a login, and if its server does
    not answer.
    """
    folder = Path(config.run_dir)
    name = config.logger.name
    if in_sweep() and name != "wandb":
        raise ConfigError(
            f"logger.name={name} in a W&B sweep, which needs val/*: "
            "add logger.name=wandb to its command"
        )
    if config.logger.weights and name != "wandb":
        raise ConfigError(
            f"logger.weights=true sends weights to W&B, and logger.name={name} does not: "
            "give logger.name=wandb"
        )
    if name == "none":
        return False
    if name == "csv":
        return CSVLogger(folder, name="logs")
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(
            "logger.name=wandb needs wandb: pip install wandb, or add logger.name=csv"
        ) from error

    _stop_wanted.clear()
    _keep_caches_in(folder)
    commit, _ = git_state()
    tags = []
    if commit is not None:
        tags.append(f"commit-{commit[:7]}")
    if config.preset:
        tags.append(config.preset)
    return StepLogger(
        batch_size=config.data.batch_size,
        sends_weights=config.logger.weights,
        id=_wandb_id(folder),
        name=folder.name,
        project=config.logger.project,
        group=config.experiment,
        tags=tags,
        save_dir=folder,
        settings=wandb.Settings(mode=_mode(), silent=True, init_timeout=INIT_WITHIN, stop_fn=_stop),
    )


def _keep_caches_in(folder: Path) -> None:
    """Let wandb keep its caches in the run's folder if the home directory cannot be written."""
    if os.access(os.path.expanduser("~"), os.W_OK):  # it stays ~ if there is no home
        return
    for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        os.environ.setdefault(name, str(folder.resolve() / "wandb" / "cache"))


def _mode() -> Mode:
    """wandb's mode: $WANDB_MODE or, without it, online if somebody is logged in, else offline.

    An online run becomes an offline one if the server does not answer. wandb by itself would wait
    for minutes without a message, and then end the run.
    """
    mode = os.environ.get("WANDB_MODE")
    if mode and mode not in get_args(Mode):
        raise ConfigError(
            f"WANDB_MODE={mode} in the environment is not known: give one of "
            f"{', '.join(get_args(Mode))}"
        )
    if mode and mode != "online":
        return cast(Mode, mode)
    _check_key()
    return "online" if _can_be_online(is_login_certain=bool(mode)) else "offline"


def _check_key() -> None:
    """ConfigError: $WANDB_API_KEY is too short to be a key of W&B. The message does not show it."""
    key = os.environ.get("WANDB_API_KEY")
    if not key or key.count(".") == 2:  # a token in the form of a JWT has two dots
        return
    n = len(key.partition("-")[2] or key)
    if n < SHORTEST_KEY:
        raise ConfigError(
            f"WANDB_API_KEY in the environment has {n} characters, and a key of W&B at least "
            f"{SHORTEST_KEY}: run unset WANDB_API_KEY and wandb login, or add logger.name=csv"
        )


@rank_zero_only
def _can_be_online(is_login_certain: bool) -> bool:
    """Whether somebody is logged in and W&B's server answers; says why if not.

    Without a login nothing is said about W&B's own server, which wandb takes if nobody names one.
    Other ranks log nothing, and the look-up of the server's address starts wandb's own process.
    """
    import wandb

    server = wandb.setup().settings.base_url
    address = _without_login(server)
    if not is_login_certain and not _logged_in(server):
        if server != wandb.Settings().base_url:
            _say_offline(f"nobody is logged in; wandb login --host={address} does it")
        return False
    if _answers(address):
        return True
    _say_offline(f"{address} does not answer")
    return False


def _without_login(url: str) -> str:
    """An address that can be printed.

    >>> _without_login("https://me:secret@wandb.example.org:8080/path")
    'https://wandb.example.org:8080/path'
    """
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _say_offline(problem: str) -> None:
    rank_zero_info(f"W&B: {problem}: this run is logged offline")


def _answers(url: str) -> bool:
    """Whether a web server gives any answer at an address within ANSWER_WITHIN seconds.

    The environment's proxies are used. The request runs in a thread, since the look-up of a host
    name has no time limit.
    """
    answered = threading.Event()

    def ask() -> None:
        try:
            urllib.request.urlopen(url, timeout=ANSWER_WITHIN).close()
        except urllib.error.HTTPError:
            pass  # this is an answer too: there is just no page at the bare address
        except urllib.error.URLError as error:
            if not isinstance(error.reason, ssl.SSLError):  # wandb may know the certificate
                return
        except (OSError, ValueError, http.client.HTTPException):  # also a wrong address of a proxy
            return
        answered.set()

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(ANSWER_WITHIN)
    return answered.is_set()


@rank_zero_only
def _wandb_id(folder: Path) -> str:
    """The run's id at W&B: in a sweep the agent's, else the one that the run's folder keeps.

    A resumed run therefore continues the same run at W&B.
    """
    path = folder / "wandb-run-id.txt"
    earlier_id = None
    if path.is_file():
        earlier_id = path.read_text().strip()
    run_id = earlier_id or secrets.token_hex(8)
    if in_sweep():
        run_id = os.environ["WANDB_RUN_ID"]
    if run_id != earlier_id:
        write(path, f"{run_id}\n")
    return run_id


def report(logger: Logger | bool | None, result: dict[str, Any]) -> None:
    """Send the result of a finished run to W&B; do nothing with another logger.

    The summary gets the tested metrics; for each claim that the run can be compared with
    `paper/<name>` and `gap/<name>` (the gap of the test, not of a validation); `status` (of the
    first claim); `note/<name>`, why a metric was not measured or how it was measured otherwise than
    the claim; and `best/val/<name>` if the best weights were tested. `val/<name>` stays the last
    value, which sweeps read. The table `comparison` has a row for each metric and claim; the
    statuses become tags. With `logger.weights=true` the tested weights follow as an artifact, a
    folder that `reproduce.load` takes.

    Args:
        logger: the logger of the trainer.
        result: the content of result.json, which is in the run's folder by now.
    """
    if not isinstance(logger, StepLogger):
        return
    logger.tell(lambda run: _report(run, result))
    if logger.sends_weights:
        folder = Path(result["config"]["run_dir"]).resolve()
        logger.tell(lambda run: _send_weights(run, folder, result))


def _report(run: wandb.Run, result: dict[str, Any]) -> None:
    import wandb

    table = wandb.Table(columns=list(COLUMNS), data=[list(row) for row in comparison_rows(result)])
    # The row comes first, since a later row would change the summary.
    run.log({"comparison": table}, commit=True)
    run.summary.update(_summary(result))
    statuses = dict.fromkeys(comparison["status"] for comparison in result["comparisons"])
    run.tags = (*(run.tags or ()), *(status for status in statuses if status != "-"))


def _send_weights(run: wandb.Run, folder: Path, result: dict[str, Any]) -> None:
    """Send the tested weights, with the files of the run that tell what they are.

    They are model.safetensors, which has no state of the optimizer, or the checkpoint of an
    objective without a flow.
    """
    import wandb

    metrics = {key: value for key, value in result["metrics"].items() if is_number(value)}
    facts = {"experiment": result["experiment"], "commit": result["commit"], **metrics}
    artifact = wandb.Artifact(f"{result['experiment']}-{run.id}", "model", metadata=facts)
    weights = (result["weights"] or {}).get("file", result["checkpoint"])
    for name in (weights, "result.json", "config.yaml"):
        # An immutable file is sent from where it is; of others wandb makes a copy in the home.
        artifact.add_file(str(folder / name), name, policy="immutable")
    run.log_artifact(artifact)


def _summary(result: dict[str, Any]) -> dict[str, Any]:
    metrics = result["metrics"]
    summary = {key: value for key, value in metrics.items() if not key.startswith("val/")}
    if result["tested"]["chosen"] == "best":
        validated = {key: value for key, value in metrics.items() if key.startswith("val/")}
        summary |= {f"best/{key}": value for key, value in validated.items()}
    for comparison in result["comparisons"]:
        if comparison["status"] == "-":  # the claim is on other data, for example
            continue
        name = short_name(comparison["metric"])
        summary[f"paper/{name}"] = comparison["value"]
        if comparison["gap"] is not None:
            summary[f"gap/{name}"] = comparison["gap"]
    for metric, note in notes_of(result).items():
        summary[f"note/{short_name(metric)}"] = note
    return {**summary, "status": result["status"]}


def mark_preempting() -> None:
    """Tell W&B that this run is preempted, so that a sweep starts it again.

    A stop that W&B itself asks for (by a sweep's early_terminate, or a person on the run's page) is
    no preemption: the sweep would start the run again and again. The agent sends SIGTERM for it, as
    Slurm does for a preemption. So inside a sweep this function first waits for up to STOP_WITHIN
    seconds, in which W&B tells whether it asked for the stop.
    """
    run = _active_run()
    if run is None:
        return
    seconds = STOP_WITHIN if in_sweep() and not run.offline else 0
    if _stop_wanted.wait(seconds):
        return
    try:
        run.mark_preempting()
    except Exception as error:  # as in StepLogger.tell
        _give_up(error)


def _stop() -> None:
    """Stop the run as a preemption does. wandb calls this in a thread if W&B asks for a stop."""
    _stop_wanted.set()
    main_thread = threading.main_thread().ident
    if hasattr(signal, "pthread_kill") and main_thread is not None:
        signal.pthread_kill(main_thread, signal.SIGTERM)
    else:  # Windows
        signal.raise_signal(signal.SIGTERM)


def close(exit_code: int) -> None:
    """End the W&B run, if there is one; for an offline run print the command that uploads it.

    Args:
        exit_code: of this process. To W&B 0 means finished; anything else means failed or, after
            `mark_preempting`, preempted.
    """
    run = _active_run()
    if run is None:
        return
    offline = run.offline
    folder = run.settings.wandb_dir
    try:
        sys.modules["wandb"].finish(exit_code=exit_code)
    except Exception as error:  # as in StepLogger.tell
        _give_up(error)
    if offline:  # all parts of a resumed run have the same id, and are uploaded in order
        parts = f"{shlex.quote(folder)}/offline-run-*"
        say(f"W&B was offline; upload this run with: wandb sync {parts}")


def _give_up(error: Exception) -> None:
    """Say that wandb has failed and is not used any more."""
    _clear()
    rank_zero_info(f"W&B has failed ({_first_line(error)}): this run continues without it")


def _clear() -> None:
    """End wandb's run and its process, if it still lives, so that they raise no error at exit.

    Nor may wandb read the program's output any more: each line would be an error in the log.
    """
    wandb = sys.modules["wandb"]
    with contextlib.suppress(Exception):  # it has no public name
        vars(wandb)["run"]._console_stop()
    vars(wandb)["run"] = None
    with contextlib.suppress(Exception, SystemExit):
        wandb.teardown()


def _first_line(error: Exception) -> str:
    """The first line of an error's message, cut off if it is long; its class if it has none."""
    text = next(iter(str(error).splitlines()), type(error).__name__)
    return textwrap.shorten(text, 120, placeholder=" ...")


def _active_run() -> wandb.Run | None:
    return getattr(sys.modules.get("wandb"), "run", None)


def _logged_in(server: str) -> bool:
    """Whether there is a key for W&B's server, where wandb looks for one."""
    import wandb

    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    try:  # with its path: else Python refuses a file that other users can read
        logins = netrc.netrc(_netrc_file())
    except (OSError, netrc.NetrcParseError):
        return False
    hosts = [urlsplit(server).netloc]
    if server == wandb.Settings().base_url:
        hosts.append(CLOUD)
    return any(logins.authenticators(host) is not None for host in hosts)


def _netrc_file() -> str:
    """The file of logins that wandb reads."""
    path = os.path.expanduser(os.environ.get("NETRC") or "~/.netrc")
    if os.name == "nt" and not os.path.exists(path):
        return os.path.expanduser("~/_netrc")
    return path
