"""Checks of settings: a value that is out of range raises an error that says what to give."""

import math
import os
from numbers import Integral
from pathlib import Path
from typing import TypeGuard


class SharedError(ValueError):
    """A mistake that all processes of a run end with, so that one of them is enough to say it."""


def check_count(key: str, value: int, least: int, most: int | None = None) -> None:
    """Refuse a value that is not a whole number from `least` to `most` (None: no upper bound).

    key: the name of the setting, for the message. Raises ValueError: the value is refused.

    >>> check_count("data.n_test", 1, least=1)
    >>> check_count("data.n_test", 0, least=1)
    Traceback (most recent call last):
        ...
    ValueError: data.n_test=0 is out of range: give a whole number of at least 1
    """
    if is_whole(value) and least <= value and (most is None or value <= most):
        return
    request = f"of at least {least}" if most is None else f"from {least} to {most}"
    raise ValueError(f"{key}={value} is out of range: give a whole number {request}")


def is_whole(value: object) -> TypeGuard[int]:
    """Whether a value is an int, of Python or numpy, but not a bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is an int or a float, but not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_share(key: str, value: float) -> None:
    """Refuse a share of an image's side that is not a number in [0, 1). Raises ValueError."""
    if not is_number(value) or not 0 <= value < 1:
        raise ValueError(
            f"{key}={value} is not a share of the image's side: give a number from 0 to less than 1"
        )


def check_deviation(key: str, value: float) -> None:
    """Refuse a standard deviation that is negative or not finite. Raises ValueError."""
    if not is_number(value) or not 0 <= value < math.inf:
        raise ValueError(f"{key}={value} is not a standard deviation: give 0 or a positive number")


def check_memory(settings: str, n_bytes: int) -> None:
    """Refuse data that are larger than the memory of this machine, before they are made.

    Nothing is refused if the size of the memory is not known (`memory_bytes`).

    settings: the settings that determine the size, as on a command line, for the message. n_bytes:
    the size. Raises ValueError.
    """
    memory = memory_bytes()
    if memory is not None and n_bytes > memory:
        raise ValueError(
            f"{settings} would take {n_bytes / 2**30:,.0f} GiB, and this machine has "
            f"{memory / 2**30:,.0f} GiB of memory: give smaller numbers"
        )


def memory_bytes() -> int | None:
    """The memory of this machine in bytes; None if Python cannot tell, as on Windows."""
    if not hasattr(os, "sysconf"):
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def expand_home(key: str, path: str | Path) -> Path:
    """Replace `~` or `~user` at the beginning of a path by a home folder, as a shell does.

    key: the name of the setting, for the message. Raises ValueError: there is no such user.

    >>> expand_home("data.root", "data").as_posix()
    'data'
    """
    folder = Path(os.path.expanduser(path))
    if folder.parts and folder.parts[0].startswith("~"):
        raise ValueError(
            f"{key}={path}: {folder.parts[0]} is not the home folder of any user: "
            "give the whole path"
        )
    return folder
