"""Checks of single values, which combine to a check of a whole file.

A check takes a value and returns the places in it that are missing or of the wrong kind. An empty
list means that the value is valid. The place `""` is the value itself; `.budget.of` and `[3].seed`
are parts of it.

>>> run = record({"seed": number, "device": text}, optional={"curve": list_of(or_null(number))})
>>> run({"seed": 0, "device": "CPU"})
[]
>>> run({"seed": None, "curve": [1, None, "x"]})
['.device', '.seed', '.curve[2]']
"""

import re
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

LARGEST = 1e100  # beyond it sums and percentages may no longer be finite
Check = Callable[[Any], list[str]]


def is_number(value: object) -> TypeGuard[float]:
    """True for a finite int or float; a diverged or missing metric is neither.

    >>> [is_number(value) for value in (3, 3.5, float("nan"), None, True, "3")]
    [True, True, False, False, False, False]
    """
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max


def check(accepts: Callable[[Any], object]) -> Check:
    """The check that passes the values for which `accepts` returns something true."""

    def places(value: Any) -> list[str]:
        if accepts(value):
            return []
        return [""]

    return places


anything = check(lambda value: True)
number = check(lambda value: is_number(value) and abs(value) < LARGEST)
positive = check(lambda value: is_number(value) and 0 < value < LARGEST)
text = check(lambda value: isinstance(value, str))
flag = check(lambda value: isinstance(value, bool))
mapping = check(lambda value: isinstance(value, dict))
fact = check(lambda value: value is None or isinstance(value, str | bool | int | float | list))
stem = check(lambda value: isinstance(value, str) and re.fullmatch(r"\w[\w.+-]*", value))


def one_of(*choices: object) -> Check:
    """The value is one of the choices."""
    return check(lambda value: isinstance(value, str) and value in choices)


def or_null(inner: Check) -> Check:
    """The value is null, or passes the inner check."""

    def places(value: Any) -> list[str]:
        if value is None:
            return []
        return inner(value)

    return places


def list_of(inner: Check, at_least: int = 0) -> Check:
    """The value is a list of `at_least` elements or more, and each passes the inner check."""

    def places(value: Any) -> list[str]:
        if not isinstance(value, list) or len(value) < at_least:
            return [""]
        return [f"[{k}]{place}" for k, element in enumerate(value) for place in inner(element)]

    return places


def mapping_of(inner: Check) -> Check:
    """The value is a mapping, and each of its values passes the inner check."""

    def places(value: Any) -> list[str]:
        if not isinstance(value, dict):
            return [""]
        return [f".{key}{place}" for key, part in value.items() for place in inner(part)]

    return places


def record(
    required: Mapping[str, Check] | None = None, optional: Mapping[str, Check] | None = None
) -> Check:
    """The value is a mapping that has the required keys, and every value passes its key's check."""
    needed = dict(required or {})
    checks = needed | dict(optional or {})

    def places(value: Any) -> list[str]:
        if not isinstance(value, dict):
            return [f".{key}" for key in needed] or [""]
        missing = [f".{key}" for key in needed if key not in value]
        present = [key for key in checks if key in value]
        return missing + [f".{key}{place}" for key in present for place in checks[key](value[key])]

    return places


def keys(inner: Check, value: Any) -> list[str]:
    """The places that a check finds in a file, such as `budget.of`; `content` is the whole file."""
    return [place.removeprefix(".") or "content" for place in inner(value)]
