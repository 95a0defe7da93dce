"""Tensors that depend on the size of the images at hand and on no weight: made once for each size."""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor


def constant(make: Callable[..., Tensor], *arguments: int, like: Tensor) -> Tensor:
    """make(*arguments) with the dtype and the device of `like`. Nobody may change the tensor: it is shared.

    make: a function of a module, of integers alone; it makes the tensor on the CPU. A compiled graph holds the tensor
    as a constant. While a CUDA graph is captured nothing is kept, since the tensor would belong to that graph.
    """
    if torch.compiler.is_compiling():
        return _in_graph(make, arguments, like.dtype, like.device)
    if like.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return make(*arguments).to(like)
    return _kept(make, arguments, like.dtype, like.device)


@lru_cache(maxsize=256)
def _kept(make: Callable[..., Tensor], arguments: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    # A tensor made in inference mode could not take part in training later.
    with torch.inference_mode(False), torch.no_grad():
        return make(*arguments).to(device, dtype)


@torch.compiler.assume_constant_result
def _in_graph(make: Callable[..., Tensor], arguments: tuple[int, ...], dtype: torch.dtype, device: torch.device):
    """A function of its own, since torch.compile looks through `lru_cache`, and warns of it."""
    return _kept(make, arguments, dtype, device)
