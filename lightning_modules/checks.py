"""Checks of settings: a value that is out of range raises an error that says what to give."""

from collections.abc import Callable

from flows.checks import check_count
from results import is_number

__all__ = ["check_count", "check_not_negative", "check_number"]


def check_number(key: str, value: float, request: str, fits: Callable[[float], bool]) -> None:
    """Refuse a value that is not a finite number, or for which `fits` returns False.

    request: what to give instead, for the message. Raises ValueError: the value is refused.

    >>> check_number("optim.lr", float("nan"), "0 or a positive number", lambda lr: lr >= 0)
    Traceback (most recent call last):
        ...
    ValueError: optim.lr=nan is out of range: give 0 or a positive number
    """
    if not is_number(value) or not fits(value):
        raise ValueError(f"{key}={value} is out of range: give {request}")


def check_not_negative(key: str, value: float) -> None:
    """Refuse a value that is negative or not a finite number. Raises ValueError."""
    check_number(key, value, "0 or a positive number", lambda number: number >= 0)
