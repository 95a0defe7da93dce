"""Checks of settings: a value that is out of its range ends in one line that says what to give."""

import math
import os
from pathlib import Path
from typing import TypeGuard


def check_count(key: str, value: int, least: int, most: int | None = None) -> None:
    """Refuse a value that is not a whole number from `least` to `most`; None is no upper bound.

    key: the name of the setting, for the message. ValueError, one line: the value is refused.

    >>> check_count("data.n_test", 1, least=1)
    >>> check_count("data.n_test", 0, least=1)
    Traceback (most recent call last):
        ...
    ValueError: data.n_test=0 is out of range: give a whole number of at least 1
    """
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if is_whole and least <= value and (most is None or value <= most):
        return
    request = f"of at least {least}" if most is None else f"from {least} to {most}"
    raise ValueError(f"{key}={value} is out of range: give a whole number {request}")


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is an int or a float; a truth value is neither."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_share(key: str, value: float) -> None:
    """Refuse a share of a side that is not in [0, 1). ValueError, one line."""
    if not is_number(value) or not 0 <= value < 1:
        raise ValueError(f"{key}={value} is a share of the side: give 0 to less than 1")


def check_deviation(key: str, value: float) -> None:
    """Refuse a standard deviation that is negative or not finite. ValueError, one line."""
    if not is_number(value) or not 0 <= value < math.inf:
        raise ValueError(f"{key}={value} is a standard deviation: give 0 or a positive number")


def check_memory(settings: str, n_bytes: int) -> None:
    """Refuse data that are larger than the memory of this machine, before they are made.

    settings: those that decide the size, as a user would give them. ValueError, one line. Nothing
    is refused where the operating system does not say how much memory it has.
    """
    memory = memory_bytes()
    if memory is not None and n_bytes > memory:
        raise ValueError(
            f"{settings} would take {n_bytes / 2**30:,.0f} GiB, and this machine has "
            f"{memory / 2**30:,.0f} GiB of memory: give less"
        )


def memory_bytes() -> int | None:
    """The memory of this machine; None where Python cannot tell, as on Windows."""
    if not hasattr(os, "sysconf"):
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def expanded(key: str, path: str | Path) -> Path:
    """A path in which `~` and `~user` stand for home folders, as in a shell.

    key: the name of the setting, for the message. ValueError, one line: there is no such user.

    >>> expanded("data.root", "data").as_posix()
    'data'
    """
    folder = Path(os.path.expanduser(path))
    if folder.parts and folder.parts[0].startswith("~"):
        raise ValueError(
            f"{key}={path}: {folder.parts[0]} is no user's home folder: give the whole path"
        )
    return folder
