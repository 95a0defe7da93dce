"""Standard output and error that may be gone: nobody reads them, or the shell has closed them."""

import os
import sys
from typing import TextIO


def open_missing_streams() -> None:
    """Put the null device in the place of a stream that the shell has closed, as `2>&-` does.

    Python has None there, and the next file that is opened would take the stream's number.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is not None:
            continue
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
        mode = "r" if number == 0 else "w"
        setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def say(*lines: object) -> None:
    """Print lines on standard output at once. That nobody reads them any more is no error."""
    try:
        print(*lines, sep="\n", flush=True)
    except BrokenPipeError:
        _discard(sys.stdout)


def flush_streams() -> None:
    """Write what is buffered.

    Where nobody reads it Python's own flush, at the end, would make the exit code 120.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            _discard(stream)


def _discard(stream: TextIO) -> None:
    """Send to the null device what the stream still holds and all that follows."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)
