"""Values that depend on the weights alone, computed once while the weights do not change."""

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import nn

from flows.transforms import in_transform

T = TypeVar("T")


class CachedValues(dict):
    """The values that a module has computed, by name.

    A copy of the module starts without any, since its weights may change.
    """

    def __deepcopy__(self, memo: dict[int, object]) -> None:
        return None


@contextlib.contextmanager
def cached(flow: nn.Module) -> Iterator[None]:
    """Within the block, and without gradients, `once` keeps what it has computed.

    Inverses of matrices and folded weights are then computed once for many samples. Do not change
    the weights within the block. (It is a block since no version counter of torch tells of every
    change: an average of the weights that is swapped in writes to `.data`.)

    >>> from flows.glow import Glow
    >>> flow = Glow((3, 8, 8), n_levels=2, depth=1, hidden_channels=4).eval()
    >>> with torch.inference_mode(), cached(flow):
    ...     batches = [flow.sample(4, temperature=0.7) for _ in range(3)]
    >>> torch.cat(batches).shape
    torch.Size([12, 3, 8, 8])
    """
    before = {module: module.__dict__.get("made_once") for module in flow.modules()}
    for module, values in before.items():
        if values is None:
            module.__dict__["made_once"] = CachedValues()
    try:
        yield
    finally:
        for module, values in before.items():
            module.__dict__["made_once"] = values


def once(module: nn.Module, name: str, make: Callable[[], T], size: tuple[int, ...] = ()) -> T:
    """make(), or within a block of `cached` what it returned the first time.

    size: of the images, where the value depends on it; the value of the newest size is kept.
    """
    values = module.__dict__.get("made_once")
    if values is None or torch.is_grad_enabled() or in_transform():
        return make()
    if name not in values or values[name][0] != size:
        values[name] = (size, make())
    return values[name][1]
