"""Values that depend only on the weights, computed once while the weights do not change."""

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import nn

from flows.transforms import in_transform

T = TypeVar("T")


class CachedValues(dict):
    """The values that a module has computed, by name.

    Deep-copying a module copies none of them (the copy's cache is None), since the weights of the
    copy may change.
    """

    def __deepcopy__(self, memo: dict[int, object]) -> None:
        return None


@contextlib.contextmanager
def cached(flow: nn.Module) -> Iterator[None]:
    """Keep the results of `once` for the duration of the block, where no gradients are computed.

    Inverses of matrices and folded weights are then computed once for many samples. Do not change
    the weights within the block. (A cache without a block could not notice every change: averaged
    weights, for example, are swapped in through `.data`, which torch's version counters miss.)

    >>> from flows.glow import Glow
    >>> flow = Glow((3, 8, 8), n_levels=2, depth=1, hidden_channels=4).eval()
    >>> with torch.inference_mode(), cached(flow):
    ...     batches = [flow.sample(4, temperature=0.7) for _ in range(3)]
    >>> torch.cat(batches).shape
    torch.Size([12, 3, 8, 8])
    """
    before = {module: module.__dict__.get("cached_values") for module in flow.modules()}
    for module, values in before.items():
        if values is None:
            module.__dict__["cached_values"] = CachedValues()
    try:
        yield
    finally:
        for module, values in before.items():
            module.__dict__["cached_values"] = values


def once(module: nn.Module, name: str, make: Callable[[], T], size: tuple[int, ...] = ()) -> T:
    """Return make(); within a block of `cached`, return what it returned the first time.

    name: the key of the value in the cache of `module`.
    size: the size of the images, if the value depends on it; only the newest size is cached.
    """
    values = module.__dict__.get("cached_values")
    if values is None or torch.is_grad_enabled() or in_transform():
        return make()
    if name not in values or values[name][0] != size:
        values[name] = (size, make())
    return values[name][1]
