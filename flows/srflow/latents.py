"""What SRFlow's latents are good for besides sampling: the paper's image manipulations.

An image that was changed is encoded given the low-resolution image that it shall agree with. Its
latents z = f(y, low_res) are then moved to where those of the model's own images lie, and decoded
again. "Latents" are those of all levels: of the last one and of every split.

All functions take images as floats in about [0, 1]. A temperature is a standard deviation here, as
everywhere in this repository, while the paper's tau is a variance there: tau = temperature^2.

Call them in eval mode and without gradients. `low_res` may be encoded before, by
`flow.encode_context(low_res)`.
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from flows.base import FlowModel
from flows.bases import StandardNormal
from flows.checks import check_temperature
from flows.context import Context

Latents = tuple[Tensor, ...]
Groups = Literal["global", "local", "spatial"]
GROUPS: tuple[str, ...] = get_args(Groups)
Reduce = Callable[[Tensor], Tensor]


def encode(flow: FlowModel, high_res: Tensor, low_res: Context) -> Latents:
    """z = f(high_res, low_res), also of an image that does not agree with low_res.

    high_res: (B, 3, H, W), whose sides the flow can halve. low_res: (B, 3, H/s, W/s). Returns the
    latents, one tensor for each level. Raises ValueError: the images do not fit the flow.
    """
    latents, _ = flow(high_res, low_res)
    return latents


def decode(flow: FlowModel, latents: Latents, low_res: Context) -> Tensor:
    """The image of latents, (B, 3, H, W), given low_res. It is the inverse of `encode`."""
    high_res, _ = flow.inverse(latents, low_res)
    return high_res


# ---------------------------------------------------------------------- normalisation


def normalized(
    latents: Latents,
    groups: Groups,
    temperature: float,
    generator: torch.Generator | None = None,
) -> Latents:
    """Give each group of latents the mean and the spread of a random group of the model.

        z' = s' (z - m) / s + m'

    m and s are the mean and the standard deviation (over N - 1) of the N latents of a group. m' and
    s' are those of N independent latents that are drawn from N(0, temperature^2), so that

        m' ~ N(0, tau / N),    s'^2 ~ Gamma(shape (N - 1) / 2, scale 2 tau / (N - 1))

    with tau = temperature^2, as in the paper. Latents that are such a sample themselves stay one.

    groups: "global", all latents of an image; "local", the channels at a position of a level;
        "spatial", the positions in a channel of a level.
    A group whose latents are all equal has no spread, and becomes m'.
    Raises ValueError: an argument is not known or out of range.

    >>> z = (5 + 3 * torch.randn(1, 6, 8, 8), torch.randn(1, 96, 2, 2))
    >>> level, _ = normalized(z, "spatial", temperature=0.0)
    >>> level.abs().max().item()
    0.0
    """
    if groups not in GROUPS:
        raise ValueError(f"groups={groups} are not known: give one of {', '.join(GROUPS)}")
    drawn = drawn_like(latents, temperature, generator)
    parts = []
    own = moments(latents, groups)
    new = moments(drawn, groups)
    for z, (mean, std), (new_mean, new_std) in zip(latents, own, new, strict=True):
        ratio = torch.where(std > 0, new_std / std, 0.0)
        parts.append((z - mean) * ratio + new_mean)
    return tuple(parts)


def moments(latents: Latents, groups: Groups) -> list[tuple[Tensor, Tensor]]:
    """The mean and the standard deviation of the groups, for each level; they broadcast to it.

    The standard deviation of a single latent is 0.
    """
    if groups == "global":
        mean, std = _moments(torch.cat([z.flatten(1) for z in latents], 1), (1,))
        return [(mean[..., None, None], std[..., None, None]) for _ in latents]
    dims = {"local": (1,), "spatial": (2, 3)}[groups]
    return [_moments(z, dims) for z in latents]


def _moments(values: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    n = 1
    for dim in dims:
        n *= values.shape[dim]
    var, mean = torch.var_mean(values, dims, correction=min(1, n - 1), keepdim=True)
    return mean, var.sqrt()


def drawn_like(
    latents: Latents, temperature: float, generator: torch.Generator | None = None
) -> Latents:
    """Latents of the same shapes from N(0, temperature^2). Raises ValueError: the temperature."""
    check_temperature(temperature)
    shapes = tuple(tuple(z.shape[1:]) for z in latents)
    return StandardNormal().sample(len(latents[0]), shapes, temperature, generator, latents[0])


# ---------------------------------------------------------------------- regions


def replaced(latents: Latents, others: Latents, mask: Tensor) -> Latents:
    """The latents of `others` in a region, and those of `latents` elsewhere.

    mask: (B, 1, H, W) or (1, 1, H, W), at the size of the image, true in the region. A latent is in
    the region if one of the pixels below it is. Raises ValueError: the mask has another shape.
    """
    n, _, height, width = latents[-1].shape
    fits = mask.dim() == 4 and mask.shape[0] in (1, n) and mask.shape[1] == 1
    if not fits or mask.shape[2] % height or mask.shape[3] % width:
        raise ValueError(
            f"the mask is {tuple(mask.shape)}: give (1, 1, H, W), or one for each of {n} images"
        )
    pixels = mask.to(latents[0])
    parts = []
    for z, other in zip(latents, others, strict=True):
        is_inside = F.adaptive_max_pool2d(pixels, z.shape[2:]) > 0
        parts.append(other.where(is_inside, z))
    return tuple(parts)


def resampled(
    flow: FlowModel,
    high_res: Tensor,
    low_res: Context,
    mask: Tensor,
    temperature: float,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw the latents of a region anew, and keep those of the rest of the image.

    The image changes a little around the region, too, as far as the flow's networks reach. The
    arguments are those of `encode` and `replaced`. Returns (B, 3, H, W).
    """
    encoding = flow.encode_context(low_res)
    latents = encode(flow, high_res, encoding)
    drawn = drawn_like(latents, temperature, generator)
    return decode(flow, replaced(latents, drawn, mask), encoding)


def transferred(
    flow: FlowModel,
    edited: Tensor,
    low_res: Context,
    mask: Tensor,
    temperature: float,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Content transfer: make what was pasted into an image agree with low_res.

    edited: an image, or a sample of the flow, into which something was pasted, (B, 3, H, W).
    low_res: that of the image before. mask: true where something was pasted; latents there are
    normalised locally, so that they are as those of the model. Returns (B, 3, H, W).
    """
    encoding = flow.encode_context(low_res)
    latents = encode(flow, edited, encoding)
    normal = normalized(latents, "local", temperature, generator)
    return decode(flow, replaced(latents, normal, mask), encoding)


def harmonized(
    flow: FlowModel,
    composite: Tensor,
    reduce: Reduce,
    mask: Tensor,
    temperature: float,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Harmonisation: give what was pasted into an image the texture that the model expects there.

    It is `transferred` with the low-resolution image of the composite, so that what was pasted
    stays. reduce: maps (B, 3, H, W) to low_res.
    """
    return transferred(flow, composite, reduce(composite), mask, temperature, generator)


def styled(flow: FlowModel, source: Tensor, source_low_res: Context, low_res: Context) -> Tensor:
    """Style transfer: the details of one image, as latents, in another one that low_res shows.

    source: (B, 3, H, W). source_low_res: its low-resolution image. low_res: that of the other
    image, of the same size. The latents are not changed.
    """
    return decode(flow, encode(flow, source, source_low_res), low_res)


def restored(
    flow: FlowModel,
    degraded: Tensor,
    reduce: Reduce,
    temperature: float,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Restoration: take away noise and other faults that a reduced image has less of.

    The latents of the degraded image, given its own low-resolution image, are normalised over
    positions, and then over channels.

    degraded: (B, 3, H, W). reduce: maps it to low_res. Returns (B, 3, H, W).
    """
    encoding = flow.encode_context(reduce(degraded))
    latents = encode(flow, degraded, encoding)
    latents = normalized(latents, "spatial", temperature, generator)
    latents = normalized(latents, "local", temperature, generator)
    return decode(flow, latents, encoding)
