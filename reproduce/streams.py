"""Printing where nobody reads standard output any more, or where the shell has closed a stream."""

import os
import sys
from typing import TextIO


def open_missing_streams() -> None:
    """Open the null device for each standard stream that the shell has closed, as `2>&-` does.

    Python's sys.stderr is None then, and the next file to be opened would take its number.
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
    """Print lines on standard output at once. It is no error if nobody reads them any more."""
    try:
        print(*lines, sep="\n", flush=True)
    except BrokenPipeError:
        _discard(sys.stdout)


def flush_streams() -> None:
    """Write the buffered output.

    If nobody reads it, Python's own flush at exit would turn the exit code into 120.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            _discard(stream)


def _discard(stream: TextIO) -> None:
    """Send the rest of a stream's buffer, and all later output, to the null device."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)
