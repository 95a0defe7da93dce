"""Ends of a run that are meant: all ranks leave at the same step, and nothing is lost."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch as L

from lightning_modules.checkpoint_io import reason

TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: everything is saved, and resume=auto goes on


class RunStopped(SystemExit):
    """Raised on all ranks at the same point: the run ends here, on purpose.

    It is a SystemExit, so that no `except Exception` on the way catches it.

    message: one line that says why the run ends and what to do.
    code: the exit code of the process.
    requeue: whether the scheduler is to start the job again.
    agreed: False where this process alone knows, outside of training, where nothing can be saved.
    """

    def __init__(
        self, message: str, code: int = 1, requeue: bool = False, agreed: bool = True
    ) -> None:
        super().__init__(code)
        self.message = message
        self.requeue = requeue
        self.agreed = agreed


class Diverged(RunStopped):
    """Too many steps were not finite: the run has an outcome, and nothing to go on with."""


def stop_all_ranks(trainer: L.Trainer, problem: str | None) -> None:
    """Raise RunStopped on every rank where rank 0 has a problem; every rank has to call it.

    problem: what has gone wrong, as far as this rank knows; only that of rank 0 counts.
    """
    problem = trainer.strategy.broadcast(problem)
    if problem is not None:
        raise RunStopped(
            f"stopped at step {trainer.global_step}: {problem}. The older checkpoints are intact"
        )


@contextlib.contextmanager
def writing(trainer: L.Trainer, path: Path) -> Iterator[None]:
    """Write a file in the block, on rank 0 alone; where that fails, all ranks stop at this step.

    Every rank has to enter the block. RunStopped, one line: the file could not be written.
    """
    problem = None
    try:
        yield
    except OSError as error:
        problem = f"{path} could not be written: {reason(error)}"
    stop_all_ranks(trainer, problem)
