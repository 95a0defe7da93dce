"""Stopping a run on purpose: all ranks leave at the same step, and nothing is lost."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch as L

from lightning_modules.checkpoint_io import reason

TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: everything is saved, and resume=auto continues


class RunStopped(SystemExit):
    """Raised on all ranks at the same point: the run ends here, on purpose.

    It is a SystemExit, so that no `except Exception` on the way catches it.

    message: one line that says why the run ends and what to do.
    code: the exit code of the process.
    requeue: whether the scheduler should start the job again.
    agreed: whether all ranks have agreed to stop; False if only this process stops, outside of
        training, where there is nothing to save.
    """

    def __init__(
        self, message: str, code: int = 1, requeue: bool = False, agreed: bool = True
    ) -> None:
        super().__init__(code)
        self.message = message
        self.requeue = requeue
        self.agreed = agreed


class Diverged(RunStopped):
    """Raised if too many steps were not finite: the run has diverged and cannot be resumed."""


class AgreedError(ValueError):
    """A user's mistake that all ranks raise at the same point, so that one is enough to say it."""


def stop_all_ranks(trainer: L.Trainer, problem: str | None) -> None:
    """Raise RunStopped on all ranks if rank 0 has a problem. All ranks have to call it.

    problem: what has gone wrong on this rank, or None; only the problem of rank 0 counts.
    """
    problem = trainer.strategy.broadcast(problem)
    if problem is not None:
        raise RunStopped(
            f"stopped at step {trainer.global_step}: {problem}. The older checkpoints are intact"
        )


@contextlib.contextmanager
def writing(trainer: L.Trainer, path: Path) -> Iterator[None]:
    """Stop all ranks at this step if the block, which writes a file on rank 0, fails.

    All ranks have to enter the block. Raises RunStopped: the file could not be written.
    """
    problem = None
    try:
        yield
    except OSError as error:
        problem = f"{path} could not be written: {reason(error)}"
    stop_all_ranks(trainer, problem)
