"""Tensors that depend on no weight, but only on the size of an image or a module's arguments."""

from collections.abc import Callable
from functools import lru_cache
from typing import Self

import torch
from torch import Tensor, nn


def constant(make: Callable[..., Tensor], *arguments: int, like: Tensor) -> Tensor:
    """make(*arguments) with the dtype and the device of `like`, computed once and then cached.

    Do not change the tensor in place, since all callers share it. A compiled graph holds it as a
    constant.

    make: a function of integers only, defined at the top level of a module.
    """
    if torch.compiler.is_compiling():
        return _constant_of_a_graph(make, arguments, like.dtype, like.device)
    tensor = _computed_once(make, arguments, like.dtype, like.device)
    if like.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # The CUDA graph being captured will read this memory at every replay: keep it allocated.
        READ_BY_GRAPHS[make, arguments, like.dtype, like.device] = tensor
    return tensor


READ_BY_GRAPHS: dict[tuple, Tensor] = {}  # tensors whose memory captured CUDA graphs read


@lru_cache(maxsize=64)
def _computed_once(
    make: Callable[..., Tensor],
    arguments: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    # A tensor made in inference mode could not take part in training later, and one made within a
    # transform of torch.func would belong to that transform.
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch._C._DisableFuncTorch(),
        torch.device("cpu"),
    ):
        return make(*arguments).to(device, dtype)


@torch.compiler.assume_constant_result
def _constant_of_a_graph(
    make: Callable[..., Tensor],
    arguments: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """`_computed_once`, hidden from torch.compile, which would ignore `lru_cache` and trace it."""
    return _computed_once(make, arguments, dtype, device)


class FixedBuffers(nn.Module):
    """A module with buffers that follow from its arguments and are not in its state dict.

    `to_empty()` gives every buffer memory with arbitrary contents, which loading a state dict would
    not overwrite. So whenever the buffers get new memory, their values are written into it.
    """

    def fixed_values(self) -> dict[str, Tensor]:
        """The values of the buffers, by name."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Apply `fn` to all tensors, as `to`, `half`, `cuda` and `to_empty` do."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        if any(buffer is not before[name] for name, buffer in self._buffers.items()):
            for name, value in self.fixed_values().items():
                buffer = self.get_buffer(name)
                if not buffer.is_meta:
                    buffer.copy_(value)
        return self
