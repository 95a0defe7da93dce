"""What the multi-scale models for images share: their sizes, and the way through their levels."""

from collections.abc import Sequence

import torch
from torch import Tensor

from flows.base import Flow
from flows.reshape import factor_in, factor_out
from flows.transforms import in_transform


def check_image_shape(
    model: str, shape: tuple[int | None, ...], n_halvings: int, key: str, value: int
) -> None:
    """ValueError, one line: `shape` is no (C, H, W), or the model halves the image to odd sizes.

    shape: H and W may be None, any size. n_halvings: how often the model halves the image. key, value: the setting
    that decides it, as the message names it.
    """
    if len(shape) != 3:
        raise ValueError(f"{model} models images (C, H, W), not data of shape {shape}")
    _, height, width = shape
    if any(side is not None and side % 2**n_halvings for side in (height, width)):
        raise ValueError(
            f"{key}={value} halves a {height}x{width} image to odd sizes: give fewer {key.split('_')[-1]}"
        )


def through(
    levels: Sequence[Flow], x: Tensor, log_det: Tensor, context=None
) -> tuple[list[Tensor], Tensor]:
    """Latents, one a level, and the log_det, (B,).

    After every level but the last the first half of the channels goes on and the second half is latent (Dinh et al.
    2017, section 3.6). x: (B, C, H, W). log_det: (B,), of what came before, to which that of the levels is added.
    context: a tensor for all levels, or a tuple with one for each.
    """
    latents = []
    for i, level in enumerate(levels[:-1]):
        x, level_log_det = level(x, of_level(context, i))
        x, z = factor_out(x)
        latents.append(z)
        log_det = log_det + level_log_det
    x, level_log_det = levels[-1](x, of_level(context, -1))
    return [*latents, x], log_det + level_log_det


def back_through(
    levels: Sequence[Flow], latents: Sequence[Tensor], log_det: Tensor, context=None
) -> tuple[Tensor, Tensor]:
    """x and the log_det of the inverse, (B,): the inverse of `through`, where log_det is added to as well."""
    x, level_log_det = levels[-1].inverse(latents[-1], of_level(context, -1))
    log_det = log_det + level_log_det
    for i in reversed(range(len(levels) - 1)):
        x, level_log_det = levels[i].inverse(factor_in(x, latents[i]), of_level(context, i))
        log_det = log_det + level_log_det
    return x, log_det


def initialize_through(levels: Sequence[Flow], x: Tensor, context=None) -> Tensor:
    """`Flow.initialize` of every level, in the order of `through`. Returns what the last level gave."""
    for i, level in enumerate(levels[:-1]):
        x, _ = factor_out(level.initialize(x, of_level(context, i)))
    return levels[-1].initialize(x, of_level(context, -1))


def of_level(context: Tensor | tuple[Tensor, ...] | None, i: int) -> Tensor | None:
    """The part of an encoded context that level i takes: a tuple holds one for each."""
    return context[i] if isinstance(context, tuple) else context


def channels_last(x: Tensor) -> Tensor:
    """The same images in the memory format in which convolutions are fastest.

    Within a transform of torch.func the format stays as it is, since vmap knows no other than the contiguous one.
    """
    if in_transform():
        return x
    return x.contiguous(memory_format=torch.channels_last)


def halved(size: int | None, times: int = 1) -> int | None:
    """A side of an image after so many halvings; None, any size, stays."""
    return None if size is None else size // 2**times
