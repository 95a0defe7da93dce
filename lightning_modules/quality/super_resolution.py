"""How close a super-resolved image is to the true one, as plain functions.

PSNR and SSIM each have two definitions, whose values differ by more than methods do. A function's
name says which one it is:

  psnr_rgb, ssim_rgb_uniform     SRFlow's (Lugmayr et al. 2020): all channels, the whole image
  psnr_y, ssim_y_gaussian        of most papers since SRCNN (Dong et al. 2014): the luma alone,
                                 without a border of as many pixels as the scale

All take uint8 images, (B, 3, H, W), and return one value for each image, (B,) float64 on the
device of the images. The mean over images is the caller's. Values are never pooled over images: the
PSNR of a set is the mean of its images' PSNR.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

LEVELS = 255  # the largest grey level
LUMA = (65.481, 128.553, 24.966)  # of R, G and B from 0 to 1; ITU-R BT.601, as MATLAB's rgb2ycbcr
BLACK = 16.0  # the luma of black
UNIFORM = 7  # the side of the window of `ssim_rgb_uniform`, in pixels
GAUSSIAN = 11  # of `ssim_y_gaussian`: Wang et al. 2004
SIGMA = 1.5  # its standard deviation, in pixels


def as_uint8(images: Tensor) -> Tensor:
    """Images with values from 0 to 1 as uint8: clipped, and rounded to the nearest grey level.

    Rounding down instead, as SRFlow's release does, costs up to 2 dB of `low_res_psnr`.
    Raises ValueError: a value is NaN, or the images are integers.

    >>> as_uint8(torch.tensor([-0.1, 0.0, 0.5, 0.9979, 1.2])).tolist()
    [0, 0, 128, 254, 255]
    """
    if not images.is_floating_point():
        raise ValueError(f"images of {images.dtype} have no values from 0 to 1")
    if images.isnan().any():
        raise ValueError("an image has values that are not numbers (NaN)")
    return (images.double().clamp(0, 1) * LEVELS).round().to(torch.uint8)


def luma(images: Tensor) -> Tensor:
    """The luma Y of uint8 images, (B, 3, H, W) to (B, 1, H, W): float64 from 16 to 235.

    It is not rounded. MATLAB's rgb2ycbcr of uint8 rounds it, which moves PSNR by about .01 dB.
    """
    weights = torch.tensor(LUMA, dtype=torch.float64, device=images.device).view(1, 3, 1, 1)
    return BLACK + (images.double() * weights).sum(1, keepdim=True) / LEVELS


def psnr_rgb(image: Tensor, reference: Tensor) -> Tensor:
    """The PSNR over all pixels and channels, in dB: 10 log10(255^2 / mean squared error).

    Equal images have infinity. Raises ValueError: the images are not uint8 of one shape.
    """
    _check(image, reference)
    return _psnr(image.double() - reference.double())


def psnr_y(image: Tensor, reference: Tensor, crop: int) -> Tensor:
    """The PSNR of the luma, in dB, without a border of `crop` pixels.

    For grey images it is 1.3 dB above `psnr_rgb`, since the range of the luma is 219 levels and the
    255 stays; for coloured ones more.

    crop: the scale, by convention. Raises ValueError: the images are not uint8 of one shape, or
    have no pixels within the border.
    """
    _check(image, reference, crop)
    return _psnr(_inner(luma(image) - luma(reference), crop))


def ssim_rgb_uniform(image: Tensor, reference: Tensor) -> Tensor:
    """The SSIM of scikit-image's defaults: the mean over positions and channels.

    The window is 7 x 7 pixels with equal weights, within the image, and the covariances are
    unbiased. Raises ValueError: the images are not uint8 of one shape, or are below the window.
    """
    _check(image, reference, window=UNIFORM)
    return _ssim(image, reference, win_size=UNIFORM)


def ssim_y_gaussian(image: Tensor, reference: Tensor, crop: int) -> Tensor:
    """The SSIM of the luma as Wang et al. (2004), without a border of `crop` pixels.

    The window is 11 x 11 pixels with Gaussian weights of a standard deviation of 1.5, within the
    image, and the covariances are biased: those of a distribution with these weights.

    crop: the scale, by convention. Raises ValueError: the images are not uint8 of one shape, or
    what is within the border is below the window.
    """
    _check(image, reference, crop, GAUSSIAN)
    return _ssim(
        _inner(luma(image), crop),
        _inner(luma(reference), crop),
        gaussian_weights=True,
        sigma=SIGMA,
        use_sample_covariance=False,
    )


def low_res_psnr(image: Tensor, low_res: Tensor, downscale: Callable[[Tensor], Tensor]) -> Tensor:
    """LR-PSNR, in dB: the `psnr_rgb` of the downscaled image and the low-resolution one.

    It says whether a super-resolved image agrees with what it was made from.

    image: (B, 3, sh, sw). low_res: (B, 3, h, w), both uint8. downscale: of uint8 images, by the
    scale s, with which `low_res` was made. Raises ValueError: the sizes do not fit.
    """
    return psnr_rgb(downscale(image), low_res)


def diversity(samples: Tensor) -> Tensor:
    """The standard deviation over samples for the same image, in grey levels.

    It is unbiased (n - 1), of each pixel and channel, and then the mean over them. The number of
    samples belongs to the figure, since a standard deviation of few samples is too low.

    samples: (n, B, 3, H, W), uint8. Raises ValueError: they are not, or n is 1.
    """
    if samples.ndim != 5 or samples.dtype != torch.uint8:
        raise ValueError(
            f"samples have to be uint8 (n, B, 3, H, W), but are {samples.dtype} "
            f"{tuple(samples.shape)}"
        )
    if len(samples) < 2:
        raise ValueError("diversity needs at least 2 samples for each image")
    return samples.double().std(0).mean((1, 2, 3))


def _psnr(difference: Tensor) -> Tensor:
    """The PSNR by the differences in grey levels, (B, C, H, W)."""
    return 10 * torch.log10(LEVELS**2 / difference.square().mean((1, 2, 3)))


def _ssim(image: Tensor, reference: Tensor, **settings: float) -> Tensor:
    """scikit-image's SSIM, the mean over channels, of each image."""
    from skimage.metrics import structural_similarity

    values = [
        structural_similarity(*pair, channel_axis=0, data_range=LEVELS, **settings)
        for pair in zip(_numpy(image), _numpy(reference), strict=True)
    ]
    return torch.tensor(values, dtype=torch.float64, device=image.device)


def _numpy(images: Tensor) -> np.ndarray:
    return images.double().cpu().numpy()


def _inner(images: Tensor, crop: int) -> Tensor:
    """Images without a border of `crop` pixels."""
    return images[:, :, crop : images.shape[2] - crop, crop : images.shape[3] - crop]


def _check(image: Tensor, reference: Tensor, crop: int = 0, window: int = 1) -> None:
    """ValueError, one line: two batches cannot be compared.

    window: the fewest pixels that each side must have within the border of `crop` pixels.
    """
    for images in (image, reference):
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"images have to be uint8 (B, 3, H, W), but are {images.dtype} "
                f"{tuple(images.shape)}"
            )
    if image.shape != reference.shape:
        raise ValueError(
            f"images of {_size(image)} cannot be compared with references of {_size(reference)}"
        )
    if crop < 0:
        raise ValueError(f"crop={crop} is out of range: give at least 0")
    if min(image.shape[2:]) - 2 * crop < window:
        border = f" without a border of {crop}" if crop else ""
        raise ValueError(
            f"images of {_size(image)} pixels are too small{border}: "
            f"at least {window} x {window} pixels have to be left"
        )


def _size(images: Tensor) -> str:
    """The number of images and their height and width, for messages."""
    return f"{len(images)} x {images.shape[2]} x {images.shape[3]}"
