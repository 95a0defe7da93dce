"""What multi-scale models of images share: checks of sizes, and the loops over their levels."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from flows.base import Flow
from flows.context import Encoding
from flows.reshape import factor_in, factor_out
from flows.transforms import in_transform

# (C, H, W), where None means any size.
ImageShape = tuple[int, int | None, int | None]
MOST_HALVINGS = 30  # of an image: no side is a multiple of 2^31


def check_image_shape(
    model: str, shape: Sequence[int | None], n_halvings: int, key: str, value: int
) -> ImageShape:
    """The shape as (C, H, W).

    n_halvings: how often the model halves the image.
    key, value: the setting that determines n_halvings, for the message.
    Raises ValueError: it is not of this form, or a side cannot be halved n_halvings times.

    >>> check_image_shape("Glow", (3, None, 32), 3, "flow.n_levels", 3)
    (3, None, 32)
    >>> check_image_shape("Glow", (3, 4, 8), 3, "flow.n_levels", 3)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    ValueError: flow.n_levels=3 halves a 4x8 image to odd sizes: give at most flow.n_levels=2, ...
    """
    channels, height, width = shape if len(shape) == 3 else (None, None, None)
    if channels is None:
        raise ValueError(f"{model} models images (C, H, W), not data of shape {tuple(shape)}")
    if any(side is not None and side % 2**n_halvings for side in (height, width)):
        largest = value - n_halvings + most_halvings(height, width)
        advice = f"sides that are multiples of {2**n_halvings}"
        if largest >= 1:
            advice = f"at most {key}={largest}, or {advice}"
        raise ValueError(
            f"{key}={value} halves a {height}x{width} image to odd sizes: give {advice}"
        )
    return channels, height, width


def most_halvings(*sides: int | None) -> int:
    """How often all sides of an image can be halved; a side that is None always can.

    >>> most_halvings(28, 28), most_halvings(48, None), most_halvings(32, 7)
    (2, 4, 0)
    """
    halvings = range(MOST_HALVINGS, 0, -1)
    known = [side for side in sides if side is not None]
    return next((n for n in halvings if all(side % 2**n == 0 for side in known)), 0)


def halved_shape(channels: int, shape: ImageShape, times: int) -> tuple[int, ...]:
    """(channels, H / 2^times, W / 2^times) for images of `shape`, (C, H, W); None stays None.

    >>> halved_shape(48, (3, 32, 16), 3)
    (48, 4, 2)
    """
    sides = (None if side is None else side // 2**times for side in shape[1:])
    return cast("tuple[int, ...]", (channels, *sides))


def levels_forward(
    levels: Sequence[Flow],
    x: Tensor,
    log_det: Tensor,
    context: Encoding | None = None,
    n_splits: int | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Map an image to its latents, one for each split and the last, and add up the log_det, (B,).

    After each of the first n_splits levels the first half of the channels goes on and the second
    half is latent (Dinh et al. 2017, section 3.6).

    x: (B, C, H, W). log_det: (B,), the log-determinant of the maps before the levels. context: a
    tensor for all levels, or a tuple with one tensor for each level. n_splits: None means after
    every level but the last.
    """
    latents = []
    for i, level in enumerate(levels):
        x, level_log_det = level(x, of_level(context, i))
        log_det = log_det + level_log_det
        if i < _splits(levels, n_splits):
            x, z = factor_out(x)
            latents.append(z)
    return [*latents, x], log_det


def levels_inverse(
    levels: Sequence[Flow],
    latents: Sequence[Tensor],
    log_det: Tensor,
    context: Encoding | None = None,
    n_splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The inverse of `levels_forward`: x, (B, C, H, W), and the sum of the log_dets, (B,)."""
    x = latents[-1]
    for i in reversed(range(len(levels))):
        if i < _splits(levels, n_splits):
            x = factor_in(x, latents[i])
        x, level_log_det = levels[i].inverse(x, of_level(context, i))
        log_det = log_det + level_log_det
    return x, log_det


def levels_initialize(
    levels: Sequence[Flow],
    x: Tensor,
    context: Encoding | None = None,
    n_splits: int | None = None,
) -> Tensor:
    """Call `Flow.initialize` of every level, in the order of `levels_forward`.

    Returns the output of the last level.
    """
    for i, level in enumerate(levels):
        x = level.initialize(x, of_level(context, i))
        if i < _splits(levels, n_splits):
            x, _ = factor_out(x)
    return x


def _splits(levels: Sequence[Flow], n_splits: int | None) -> int:
    """The number of levels after which half of the channels is factored out."""
    if n_splits is None:
        return len(levels) - 1
    return n_splits


def of_level(context: Encoding | None, i: int) -> Tensor | None:
    """The part of an encoded context that level i takes: a tuple has one part for each level."""
    return context[i] if isinstance(context, tuple) else context


def channels_last(x: Tensor) -> Tensor:
    """The same images in the memory format in which convolutions are fastest.

    Within a transform of torch.func the format stays, since vmap supports only contiguous tensors.
    """
    if in_transform():
        return x
    return x.contiguous(memory_format=torch.channels_last)
