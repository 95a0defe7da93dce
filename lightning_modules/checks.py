"""Checks of settings: a value that is out of range raises an error that says what to give."""

from collections.abc import Callable

from results import is_number


def check_count(key: str, value: int, least: int = 0, most: int | None = None) -> None:
    """Refuse a value that is not a whole number from `least` to `most` (None: no upper bound).

    key: the name of the setting, for the message. Raises ValueError: the value is refused.

    >>> check_count("samples.n", 64, least=1)
    >>> check_count("samples.n", 0, least=1)
    Traceback (most recent call last):
        ...
    ValueError: samples.n=0 is out of range: give a whole number of at least 1
    """
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if is_whole and least <= value and (most is None or value <= most):
        return
    request = f"of at least {least}" if most is None else f"from {least} to {most}"
    raise ValueError(f"{key}={value} is out of range: give a whole number {request}")


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
