"""Exchange between the ranks of a run."""

from typing import Any, TypeVar

from torch import distributed

T = TypeVar("T")


def everywhere(value: T) -> list[T]:
    """The value of each rank, on every rank. All ranks have to call it.

    >>> everywhere(3)  # of one process
    [3]
    """
    if not distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values
