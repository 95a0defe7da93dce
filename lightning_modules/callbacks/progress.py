"""A progress bar with images per second and the time left."""

import contextlib
import logging
import sys
import time
from collections.abc import Iterator
from datetime import timedelta

import lightning.pytorch as L
from lightning.pytorch.callbacks import Timer, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from lightning_modules.lightning_internals import callbacks_of
from lightning_modules.optimizer_steps import last_step


class Progress(TQDMProgressBar):
    """Lightning's bar with images/s and the time left until the end of the run.

    batch_size: the size of a global batch. enabled: whether the bar is drawn; if not, for example
    because the output is no terminal, only the rows of the curve are printed.
    """

    def __init__(self, batch_size: int, enabled: bool) -> None:
        super().__init__(refresh_rate=1 if enabled else 0)
        self.batch_size = batch_size
        self.started = time.monotonic()
        self.first_step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.started = time.monotonic()
        self.first_step = trainer.global_step
        super().on_train_start(trainer, pl_module)

    def get_metrics(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Lightning's metrics, and from the second step on images/s and the time left.

        The time left comes first, since a terminal of 80 columns cuts off the end of the bar.
        """
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        steps = trainer.global_step - self.first_step
        if not trainer.training or steps <= 0:
            return metrics
        rate = steps / (time.monotonic() - self.started)
        own: dict[str, int | str | float | dict[str, float]] = {}
        left = seconds_left(trainer, rate)
        if left is not None:
            own["left"] = str(timedelta(seconds=int(left)))
        own["images/s"] = f"{rate * self.batch_size:.0f}"
        return own | metrics


def seconds_left(trainer: L.Trainer, rate: float) -> float | None:
    """The time until the last step or until trainer.max_time, whichever comes first.

    rate: steps a second. None: neither steps nor epochs nor the time are limited.
    """
    limits = []
    last = last_step(trainer)
    if last is not None:
        limits.append((last - trainer.global_step) / rate)
    for callback in callbacks_of(trainer):
        if isinstance(callback, Timer):  # Lightning makes one for trainer.max_time
            remaining = callback.time_remaining()
            if remaining is not None:
                limits.append(max(0.0, remaining))
    return min(limits, default=None)


class AboveBar(logging.StreamHandler):
    """Prints messages above the progress bar, which then moves one line down."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            Tqdm.write(self.format(record), file=self.stream)
        except Exception:  # logging reports it, as of every handler
            self.handleError(record)


@contextlib.contextmanager
def lines_above_bar() -> Iterator[None]:
    """Print Lightning's messages, and ours, above the progress bar instead of into it."""
    log = logging.getLogger("lightning.pytorch")
    handlers = log.handlers
    log.handlers = [_above(handler) for handler in handlers]
    try:
        yield
    finally:
        log.handlers = handlers


def _above(handler: logging.Handler) -> logging.Handler:
    """A handler that writes above the bar, in the place of one that writes to the terminal."""
    if not isinstance(handler, logging.StreamHandler):
        return handler
    if handler.stream not in (sys.stdout, sys.stderr):
        return handler
    above = AboveBar(handler.stream)
    above.setFormatter(handler.formatter)
    above.setLevel(handler.level)
    for log_filter in handler.filters:
        above.addFilter(log_filter)
    return above
