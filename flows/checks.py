"""Checks of arguments: a value that is out of its range ends in one line that says what to give."""

import math
from numbers import Integral, Real
from typing import TypeGuard

from torch import Tensor

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


def check_temperature(value: object) -> None:
    """Refuse a temperature that is not a number of at least 0. Raises ValueError, one line.

    A tensor passes, since reading its value would make the host wait for a GPU.

    >>> check_temperature(0.7)
    >>> check_temperature(-1)
    Traceback (most recent call last):
        ...
    ValueError: temperature=-1 is out of range: give a number of at least 0
    """
    if isinstance(value, Tensor):
        return
    if isinstance(value, Real) and not isinstance(value, bool):
        number = float(value)
        if math.isfinite(number) and number >= 0:
            return
    raise ValueError(f"temperature={value} is out of range: give a number of at least 0")


def is_whole(value: object) -> TypeGuard[int]:
    """Whether a value is an int, of Python or numpy, but not a bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)
