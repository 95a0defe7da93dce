"""Tensors that depend on no weight: of the size of the images at hand, or of a module's arguments."""

from collections.abc import Callable
from functools import lru_cache
from typing import Self

import torch
from torch import Tensor, nn


def constant(make: Callable[..., Tensor], *arguments: int, like: Tensor) -> Tensor:
    """make(*arguments) with the dtype and the device of `like`. Nobody may change the tensor: it is shared.

    make: a function of a module, of integers alone; it makes the tensor on the CPU. A compiled graph holds the tensor
    as a constant.
    """
    if torch.compiler.is_compiling():
        return _in_graph(make, arguments, like.dtype, like.device)
    tensor = _kept(make, arguments, like.dtype, like.device)
    if like.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # The passes before a capture have made it. The graph reads its memory from now on.
        READ_BY_GRAPHS[make, arguments, like.dtype, like.device] = tensor
    return tensor


READ_BY_GRAPHS: dict[tuple, Tensor] = {}


@lru_cache(maxsize=64)
def _kept(
    make: Callable[..., Tensor],
    arguments: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    # A tensor made in inference mode could not take part in training later, and one made within a transform of
    # torch.func would belong to that transform.
    with (
        torch.device("cpu"),
        torch._C._DisableFuncTorch(),
        torch.inference_mode(False),
        torch.no_grad(),
    ):
        return make(*arguments).to(device, dtype)


@torch.compiler.assume_constant_result
def _in_graph(
    make: Callable[..., Tensor],
    arguments: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
):
    """A function of its own, since torch.compile looks through `lru_cache`, and warns of it."""
    return _kept(make, arguments, dtype, device)


class FixedBuffers(nn.Module):
    """A module with buffers that its arguments decide, and that are not in its state dict.

    `to_empty()` gives every buffer memory with arbitrary contents, which loading weights would not mend. Wherever these
    buffers get other memory, their values are written into it.
    """

    def fixed_values(self) -> dict[str, Tensor]:
        """The values of the buffers, by name."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        if any(buffer is not before[name] for name, buffer in self._buffers.items()):
            for name, value in self.fixed_values().items():
                if not self._buffers[name].is_meta:
                    self._buffers[name].copy_(value)
        return self
