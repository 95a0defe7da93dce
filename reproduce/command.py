"""How a command ends: well, by a mistake, or because it was asked to."""

import contextlib
import functools
import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig

from lightning_modules.callbacks.preemption import MEANING
from lightning_modules.lightning_internals import kill_ranks
from lightning_modules.stopping import TRY_AGAIN, RunStopped
from reproduce.config import ConfigError
from reproduce.launch import requeue
from reproduce.loggers import close, mark_preempting
from reproduce.streams import flush_streams, open_missing_streams

# How Python refuses a key of a recipe's section that the class which the section goes to does not take.
UNKNOWN_ARGUMENT = re.compile(r"^(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'")


def command(main):
    """Turn a user's mistake into one line and exit code 1, and being asked to stop into exit code 75.

    Mistakes: a ConfigError, a setting that Lightning refuses, an OSError (missing file, full disk), a ValueError (an
    impossible value, whoever finds it), a key of a recipe that a constructor does not take. PAPERFLOWS_TRACEBACK=1
    shows where it was raised; other errors always do.
    """

    @functools.wraps(main)
    def wrapped(argv=None):
        open_missing_streams()
        in_main_thread = threading.current_thread() is threading.main_thread()
        handlers = {number: signal.getsignal(number) for number in MEANING if in_main_thread}
        code = 1
        try:
            result = main(argv)
            code = 0
            return result
        except RunStopped as stop:
            code = stop.code
            _leave(stop)
        except (ConfigError, MisconfigurationException, OSError, ValueError) as error:
            if os.environ.get("PAPERFLOWS_TRACEBACK"):
                raise
            if isinstance(error, ConfigError) and rank_zero_only.rank:  # rank 0 says it
                sys.exit(1)
            sys.exit(f"error: {' '.join(str(error).split())}")
        except TypeError as error:
            argument = UNKNOWN_ARGUMENT.search(str(error))
            if argument is None or os.environ.get("PAPERFLOWS_TRACEBACK"):
                raise
            sys.exit(
                f"error: {argument[1]} takes no '{argument[2]}': look for it in the recipe, and at --help"
            )
        except KeyboardInterrupt:
            sys.exit("stopped")
        except SystemExit as end:
            code = 1 if end.code else 0
            raise
        finally:
            close(code)
            flush_streams()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    return wrapped


def _leave(stop: RunStopped) -> None:
    """The end of a run that all ranks have agreed on: rank 0 says why and has the exit code.

    The others end with 0: whoever started them (Lightning, srun, torchrun) would kill rank 0 for any other code. That
    is what they are to do where one rank alone knows.
    """
    if stop.code == TRY_AGAIN:
        mark_preempting()
    if (
        stop.requeue and not rank_zero_only.rank
    ):  # before what may take long: Slurm waits before it kills
        requeue()
    if rank_zero_only.rank:
        sys.exit(0 if stop.agreed else stop.code)
    if stop.code == 1:
        sys.exit(f"error: {stop.message}")
    print(stop.message, file=sys.stderr, flush=True)
    sys.exit(stop.code)


@contextlib.contextmanager
def resumable(config: DictConfig, trainer: L.Trainer) -> Iterator[None]:
    """Where a run was stopped, or interrupted twice, say how to go on."""
    script = Path("reproduce", f"{config.experiment}.py")
    program = (
        [script.as_posix()] if script.is_file() else ["-m", f"reproduce.{config.experiment}"]
    )  # installed
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
