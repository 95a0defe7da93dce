"""Bicubic resizing by whole factors, as MATLAB's imresize does it.

Low-resolution images of the literature are made this way. PyTorch's antialiased bicubic filter has
the same kernel (Keys 1981, a = -1/2, as wide as the scale when an image shrinks), but leaves out
what lies beyond the image. MATLAB mirrors the image there, which changes values at the border by
up to a dozen grey levels: so it is mirrored here, and what belongs to the mirror is cut off again.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

MARGIN = 4  # pixels of the smaller image that are mirrored at each side; the kernel reaches over 2
ROUNDINGS = ("once", "axis")


def downscale(images: Tensor, scale: int, rounding: str = "once") -> Tensor:
    """Images with 1/scale of the height and width, antialiased.

    uint8 images are computed in float64 and rounded, halves up, and clipped. Floating-point ones
    are neither rounded nor clipped.

    Args:
        images: (B, C, H, W), uint8 or floating-point. H and W are multiples of the scale.
        scale: a whole number of at least 1.
        rounding: of uint8 images. "once": the result. "axis": first the image that has been resized
            vertically, and then the result. MATLAB does so, which changes a tenth of the values by
            a grey level.

    Returns:
        (B, C, H/scale, W/scale), of the dtype of `images`.

    Raises:
        ValueError: one line: an argument is not as above.
    """
    _check(images, scale, rounding)
    height = images.shape[2]
    width = images.shape[3]
    if height % scale or width % scale:
        raise ValueError(
            f"images of {height} x {width} pixels cannot be downscaled by {scale}: "
            "crop them to multiples of the scale"
        )
    return _resize(images, (height // scale, width // scale), rounding)


def upscale(images: Tensor, scale: int, rounding: str = "once") -> Tensor:
    """Images with `scale` times the height and width, by bicubic interpolation.

    (B, C, H, W) to (B, C, scale H, scale W). The rest is as in `downscale`.
    """
    _check(images, scale, rounding)
    return _resize(images, (images.shape[2] * scale, images.shape[3] * scale), rounding)


def _check(images: Tensor, scale: int, rounding: str) -> None:
    """ValueError, one line: an argument cannot be used."""
    if images.ndim != 4 or not (images.dtype == torch.uint8 or images.is_floating_point()):
        raise ValueError(
            "images have to be uint8 or floating-point (B, C, H, W), but are "
            f"{images.dtype} {tuple(images.shape)}"
        )
    if not isinstance(scale, int) or scale < 1:
        raise ValueError(f"scale={scale} is out of range: give a whole number of at least 1")
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding={rounding} is unknown: give {' or '.join(ROUNDINGS)}")


def _resize(images: Tensor, size: tuple[int, int], rounding: str) -> Tensor:
    """Images of another size, (H, W): resized first vertically, then horizontally, as MATLAB."""
    values = images.double()
    for axis in (2, 3):
        values = _resize_axis(values, axis, size[axis - 2])
        is_last = axis == 3
        if images.dtype == torch.uint8 and (is_last or rounding == "axis"):
            values = (values + 0.5).floor().clamp(0, 255)
    return values.to(images.dtype)


def _resize_axis(values: Tensor, axis: int, length: int) -> Tensor:
    """Values, (B, C, H, W), with another length along one axis."""
    old = values.shape[axis]
    unit = min(old, length)  # old / unit or length / unit is 1, and the other one is the scale
    margin = MARGIN * (old // unit)
    new_margin = MARGIN * (length // unit)
    extended = values.index_select(axis, mirrored(old, margin).to(values.device))
    size = list(extended.shape[2:])
    size[axis - 2] = length + 2 * new_margin
    resized = F.interpolate(extended, size, mode="bicubic", antialias=True)
    return resized.narrow(axis, new_margin, length)


def mirrored(n: int, margin: int) -> Tensor:
    """The indices of a row of n pixels that is mirrored at its ends, (n + 2 margin,) int64.

    The pixels at the ends are repeated, and a margin may be longer than the row.

    >>> mirrored(3, margin=4).tolist()
    [2, 2, 1, 0, 0, 1, 2, 2, 1, 0, 0]
    """
    position = torch.arange(-margin, n + margin) % (2 * n)
    return torch.minimum(position, 2 * n - 1 - position)
