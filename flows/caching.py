"""What depends on weights alone, made once while they do not change: inverses, folded weights."""

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import nn

from flows.transforms import in_transform

T = TypeVar("T")


class CachedValues(dict):
    """What a module has made, by name. A copy of the module, whose weights may change, starts without."""

    def __deepcopy__(self, memo: dict) -> None:
        return None


@contextlib.contextmanager
def cached(flow: nn.Module) -> Iterator[None]:
    """Within the block, and without gradients, `once` keeps what it has made. Leave the weights alone there.

    A block, since no version counter tells of every change of weights: an average that is swapped in writes to `.data`.
    """
    before = {module: module.__dict__.get("made_once") for module in flow.modules()}
    for module, made in before.items():
        module.made_once = CachedValues() if made is None else made
    try:
        yield
    finally:
        for module, made in before.items():
            module.made_once = made


def once(module: nn.Module, name: str, make: Callable[[], T], size: tuple[int, ...] = ()) -> T:
    """make(), or within a block of `cached` what it gave the first time.

    size: of the images at hand, where the value depends on it; that of the newest size is kept.
    """
    values = module.__dict__.get("made_once")
    if values is None or torch.is_grad_enabled() or in_transform():
        return make()
    if name not in values or values[name][0] != size:
        values[name] = (size, make())
    return values[name][1]
