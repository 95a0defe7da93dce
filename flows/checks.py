"""Checks of arguments: a value that is out of its range ends in one line that says what to give."""

from numbers import Integral
from typing import TypeGuard

LARGEST_DEPTH = 1000  # of layers behind one another; building more would take minutes


def check_count(key: str, value: int, least: int = 0, most: int | None = None) -> None:
    """Refuse a value that is not a whole number from `least` to `most`; None is no upper bound.

    key: the name of the setting, for the message. ValueError, one line: the value is refused.

    >>> check_count("flow.depth", 32, least=1)
    >>> check_count("flow.depth", 0, least=1)
    Traceback (most recent call last):
        ...
    ValueError: flow.depth=0 is out of range: give a whole number of at least 1
    """
    if is_whole(value) and least <= value and (most is None or value <= most):
        return
    request = f"of at least {least}" if most is None else f"from {least} to {most}"
    raise ValueError(f"{key}={value} is out of range: give a whole number {request}")


def is_whole(value: object) -> TypeGuard[int]:
    """Whether a value is an int, of Python or numpy, but not a bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)
