"""Models that are timed in turns: on a CPU each in a process of its own, on a GPU in this one."""

import contextlib
import multiprocessing
import signal
import statistics
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch

from reproduce.config import ConfigError

Key = TypeVar("Key", bound=Hashable)


class InProcess:
    """A model whose methods are timed in this process.

    `turn(method)` returns the seconds that a method of the object `make()` takes, and its result.
    """

    def __init__(self, make: Callable[[], object]) -> None:
        self.candidate = make()

    def __call__(self, method: str) -> tuple[float, Any]:
        _wait()
        start = time.perf_counter()
        answer = getattr(self.candidate, method)()
        _wait()
        return time.perf_counter() - start, answer

    def close(self) -> None:
        """No turns after this."""
        del self.candidate


class OwnProcess:
    """A model whose methods are timed in a process of its own, which sleeps between turns.

    `make` and the results of methods are pickled. It is for a CPU, where models in one process
    share the memory that malloc keeps: normflows' step was faster beside one version of ours than
    beside another. In a training run a model has that memory for itself.
    """

    def __init__(self, make: Callable[[], object]) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, child_end = context.Pipe()
        self.process = context.Process(target=_serve, args=(make, child_end), daemon=True)
        with _no_interrupts():  # Ctrl-C ends this process; the closed pipe then ends the other
            self.process.start()
        child_end.close()  # so that the pipe closes when the process ends
        self._receive()

    def __call__(self, method: str) -> tuple[float, Any]:
        time.sleep(0.05)  # OpenMP's threads of the last turn keep spinning for some milliseconds
        with contextlib.suppress(ConnectionError):  # `_receive` raises the error
            self.pipe.send(method)
        return self._receive()

    def close(self) -> None:
        """No turns after this."""
        self.pipe.close()
        self.process.join()

    def _receive(self) -> Any:
        try:
            return self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            raise ConfigError(
                f"a process that measures ended with exit code {self.process.exitcode}: "
                "with -9 memory was short; otherwise its traceback is printed above"
            ) from None


def _serve(make: Callable[[], object], pipe: Connection) -> None:
    _keep_freed_memory()
    turn = InProcess(make)
    try:
        pipe.send(None)
        while True:
            pipe.send(turn(pipe.recv()))
    except (EOFError, ConnectionError):
        return


@contextlib.contextmanager
def _no_interrupts() -> Iterator[None]:
    """Let processes that are started in this block ignore SIGINT for their whole life.

    Outside of the main thread, where Python cannot set handlers, nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _keep_freed_memory() -> None:
    """Let malloc keep up to 64 MiB of freed memory, instead of returning it to the system.

    glibc's thresholds follow the largest block of at most 32 MiB that was freed (mallopt(3)): such
    a block is freed here. In a training run the thresholds rise by themselves, sooner or later;
    here they are set at once, equal for all models.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8)


def interleaved(
    turns: Mapping[Key, Callable[[str], tuple[float, Any]]], method: str, rounds: int
) -> dict[Key, float]:
    """The median seconds of each model.

    All models take a turn in every round. The first round does not count.
    """
    seconds: dict[Key, list[float]] = {key: [] for key in turns}
    for i in range(rounds + 1):
        for key, turn in turns.items():
            taken, _ = turn(method)
            if i:
                seconds[key].append(taken)
    return {key: statistics.median(values) for key, values in seconds.items()}


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
