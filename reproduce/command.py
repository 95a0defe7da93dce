"""How a command ends: it is done, a user made a mistake, or somebody asked it to stop."""

import contextlib
import functools
import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn, ParamSpec, TypeVar, cast

import lightning.pytorch as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from datamodules.checks import SharedError
from lightning_modules.callbacks.preemption import MEANING
from lightning_modules.lightning_internals import kill_ranks
from lightning_modules.stopping import TRY_AGAIN, AgreedError, RunStopped
from reproduce.config import ConfigError
from reproduce.launch import requeue
from reproduce.loggers import close, mark_preempting
from reproduce.run_folder import leave_no_empty_run
from reproduce.streams import flush_streams, open_missing_streams

# Python's message for a keyword argument that a constructor does not have. The keyword is a key in
# a section of a recipe.
UNKNOWN_ARGUMENT = re.compile(r"^(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'")
# PyTorch's messages, on a CPU and on a GPU, for a tensor that does not fit into memory.
TOO_LARGE = re.compile(
    r"allocate memory|out of memory|not enough memory|[Ss]torage size calculation overflowed"
)


Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def command(main: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Turn a user's mistake into one line and exit code 1, and a request to stop into exit code 75.

    Mistakes are a ConfigError, a setting that Lightning refuses, an OSError (a missing file, a full
    disk), any ValueError, a key of a recipe that a constructor does not have, and a model that does
    not fit into memory. Every other error is a fault of the program and has its traceback. With
    PAPERFLOWS_TRACEBACK=1 mistakes have theirs, too.
    """

    @functools.wraps(main)
    def wrapped(*arguments: Arguments.args, **keywords: Arguments.kwargs) -> Result:
        open_missing_streams()
        handlers: dict = {}
        if threading.current_thread() is threading.main_thread():
            handlers = {number: signal.getsignal(number) for number in MEANING}
        code = 1
        try:
            result = main(*arguments, **keywords)
            code = 0
            return result
        except RunStopped as stop:
            code = exit_code(stop)
            _exit(stop)
        except KeyboardInterrupt:
            sys.exit("stopped")
        except SystemExit as end:
            code = 1 if end.code else 0
            raise
        except Exception as error:
            line = mistake(error)
            if line is None or os.environ.get("PAPERFLOWS_TRACEBACK"):
                raise
            leave_no_empty_run()
            if isinstance(error, ConfigError) and _rank():  # rank 0 prints the line
                sys.exit(1)
            is_agreed = isinstance(error, SharedError | AgreedError)
            if is_agreed and _rank():  # as `_exit`, if all ranks have agreed
                sys.exit(0)
            sys.exit(f"error: {line}")
        finally:
            close(code)
            flush_streams()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    return wrapped


def mistake(error: Exception) -> str | None:
    """The one line that answers a user's mistake; None if the error is a fault of the program."""
    line = " ".join(str(error).split())
    if isinstance(error, ConfigError | MisconfigurationException | OSError | ValueError):
        return line
    argument = UNKNOWN_ARGUMENT.search(str(error))
    if isinstance(error, TypeError) and argument is not None:
        return f"{argument[1]} takes no '{argument[2]}': look for it in the recipe, and at --help"
    if isinstance(error, OmegaConfBaseException):
        return f"the recipe does not fit its script: {str(error).splitlines()[0]}"
    if isinstance(error, torch.linalg.LinAlgError):
        return f"a matrix of the model cannot be inverted: give a smaller optim.lr ({line[:200]})"
    is_too_large = isinstance(error, RuntimeError) and TOO_LARGE.search(line) is not None
    if is_too_large or isinstance(error, MemoryError):
        return f"not enough memory: give a smaller model or data.batch_size ({line[:200]})"
    return None


def exit_code(stop: RunStopped) -> int:
    """The exit code of a stopped run, an int. (Python's SystemExit allows a text as well.)"""
    return cast("int", stop.code)


def _rank() -> int:
    """The rank of this process, which Lightning keeps in an attribute of a function."""
    return cast("int", vars(rank_zero_only).get("rank") or 0)


def _exit(stop: RunStopped) -> NoReturn:
    """End the process of a stopped run. Rank 0 prints the reason and ends with the exit code.

    If all ranks have agreed to stop, the others end with 0: for any other code their launcher
    (Lightning, srun, torchrun) would kill rank 0. If only one rank knows of the stop, it ends with
    the code, so that the launcher kills the others.
    """
    code = exit_code(stop)
    if code == TRY_AGAIN:
        mark_preempting()
    if stop.requeue and not _rank():  # before W&B is closed, which may outlast Slurm's patience
        requeue()
    if _rank():
        sys.exit(0 if stop.agreed else code)
    if code == 1:
        sys.exit(f"error: {stop.message}")
    print(stop.message, file=sys.stderr, flush=True)
    sys.exit(code)


@contextlib.contextmanager
def resumable(config: DictConfig, trainer: L.Trainer) -> Iterator[None]:
    """If the run in this block is stopped, or interrupted twice, add the command that continues it.

    If only this rank knows of the stop, kill the others.
    """
    script = Path("reproduce", f"{config.experiment}.py")
    program = [script.as_posix()]
    if not script.is_file():  # the package is installed, and this is no clone
        program = ["-m", f"reproduce.{config.experiment}"]
    again = shlex.join(["python", *program, *config.overrides, f"run_dir={config.run_dir}"])
    try:
        yield
    except RunStopped as stop:
        if not stop.agreed:
            kill_ranks(trainer)
        if stop.code == TRY_AGAIN:
            stop.message += f"; go on with: {again} resume=auto"
        raise
    except SystemExit:  # how Lightning ends after a KeyboardInterrupt
        sys.exit(f"stopped at step {trainer.global_step}; go on with: {again} resume=auto")
