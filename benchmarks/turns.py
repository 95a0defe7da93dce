"""Things that are timed in turns: on a CPU each in a process of its own, on a GPU in this one."""

import contextlib
import multiprocessing
import signal
import statistics
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch

from reproduce.config import ConfigError

Key = TypeVar("Key", bound=Hashable)


class Here:
    """turn(method): the seconds that a method of make() takes, and what it gives. No arguments."""

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


class Apart:
    """The same in a process of its own, which sleeps between turns; `make` and what methods give are sent, so pickled.

    For a CPU: models in one process share the memory that malloc keeps, and normflows' step was 15 % faster beside one
    version of ours than beside another. In a run a model does not share it.
    """

    def __init__(self, make: Callable[[], object]) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, child_end = context.Pipe()
        self.process = context.Process(target=_serve, args=(make, child_end), daemon=True)
        with _no_interrupts():  # Ctrl-C ends the one that asks, and then the pipe
            self.process.start()
        child_end.close()  # so that the end of the process ends the pipe
        self._receive()

    def __call__(self, method: str) -> tuple[float, Any]:
        time.sleep(0.05)  # OpenMP's threads of whose turn it was spin on for some milliseconds
        with contextlib.suppress(ConnectionError):  # `_receive` says it
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
            problem = f"a process that measures ended with exit code {self.process.exitcode}"
            raise ConfigError(
                f"{problem}: -9 says out of memory; else its traceback stands above"
            ) from None


def _serve(make: Callable[[], object], pipe: Connection) -> None:
    _keep_freed_memory()
    turn = Here(make)
    try:
        pipe.send(None)
        while True:
            pipe.send(turn(pipe.recv()))
    except (EOFError, ConnectionError):
        return


@contextlib.contextmanager
def _no_interrupts() -> Iterator[None]:
    """For a process that starts inside, and stays: SIGINT is ignored. Outside of the main thread nothing is changed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _keep_freed_memory() -> None:
    """The heap keeps freed memory from here on, up to 64 MiB, where glibc returned it and had it zeroed again.

    Its malloc's thresholds follow the largest block that was freed, if that has at most 32 MiB (mallopt(3)). In a run
    they rise by themselves, sooner or later; here they are set at once, and the same for all. On two AVX2 cores it made
    Glow's steps at K=8, ours and normflows', 2 to 15 % faster.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8)


def interleaved(
    turns: dict[Key, Callable[[str], tuple[float, Any]]], method: str, rounds: int
) -> dict[Key, float]:
    """Median seconds of each, all of them in every round, after one round that does not count."""
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
