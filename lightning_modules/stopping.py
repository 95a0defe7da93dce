"""Ends of a run that are meant: all ranks leave at the same step, and nothing is lost."""

TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: everything is saved, resume=auto goes on


class RunStopped(SystemExit):
    """Raised on all ranks at the same point: the run ends here, on purpose.

    A SystemExit, so that no `except Exception` on the way swallows it. message: one line that says why and what to do.
    code: the exit code of the process. requeue: whether the scheduler is to start the job again. agreed: False where
    this process alone knows, outside of training, where there is nothing to save.
    """

    def __init__(
        self, message: str, code: int = 1, requeue: bool = False, agreed: bool = True
    ) -> None:
        super().__init__(code)
        self.message, self.requeue, self.agreed = message, requeue, agreed


class Diverged(RunStopped):
    """Too many steps were not finite: the run has an outcome, and nothing to go on with."""
